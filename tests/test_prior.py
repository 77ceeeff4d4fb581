"""The prior in metadata: what is written is read again, and what is damaged is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coreinfer_edge import convert
from coreinfer_edge.core_context import Ffn
from coreinfer_edge.edge import EdgeLLM
from coreinfer_edge.errors import CoreInferError, ModelFileError
from coreinfer_edge.gguf_header import read_header
from coreinfer_edge.prior import Clusters, Prior, from_header, to_metadata

RandomModel = Callable[..., Path]

N_FF, N_LAYER = 160, 4


def some_prior(clusters: bool = True, n_ff: int = N_FF) -> Prior:
    rng = np.random.default_rng(0)

    def arrays() -> list[Any]:
        return [rng.random(n_ff, dtype=np.float32) for _ in range(N_LAYER)]

    counts = [rng.integers(0, 256, (3, n_ff), dtype=np.uint8) for _ in range(N_LAYER)]
    means = [x - np.float32(0.5) for x in arrays()]
    return Prior(
        list(range(N_LAYER)),
        1000,
        means,
        arrays(),
        arrays(),
        Clusters(counts, 0.25) if clusters else None,
    )


@pytest.fixture
def written(
    random_model: RandomModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """``written(change, clusters) -> Path``: a model with the metadata of a prior, changed."""

    def write(
        change: Callable[[dict[str, Any]], Any] = lambda _: None, clusters: bool = True
    ) -> Path:
        prior = some_prior(clusters)
        metadata = to_metadata(prior)
        change(metadata)
        monkeypatch.setattr(convert, "to_metadata", lambda _: metadata)
        path = tmp_path / "with-prior.gguf"
        convert.write_with_prior(read_header(random_model("llama")), prior, path, overwrite=True)
        return path

    return write


@pytest.mark.parametrize("clusters", [True, False])
def test_a_prior_is_read_as_it_was_written(written: Callable[..., Path], clusters: bool) -> None:
    prior = from_header(read_header(written(clusters=clusters)))
    expected = some_prior(clusters)
    assert prior is not None
    assert (prior.layers, prior.n_tokens) == (expected.layers, expected.n_tokens)
    for name in ("mean", "mean_square", "normalized_mean_square"):
        for actual, array in zip(getattr(prior, name), getattr(expected, name), strict=True):
            np.testing.assert_array_equal(actual, array)
            assert actual.dtype == np.float32
    if not clusters:
        assert prior.clusters is None
        return
    assert prior.clusters is not None
    assert expected.clusters is not None
    assert len(prior.clusters) == 3
    assert prior.clusters.top_share == 0.25
    for counts, wanted in zip(prior.clusters.frequency, expected.clusters.frequency, strict=True):
        np.testing.assert_array_equal(counts, wanted)


def test_a_model_without_statistics_has_no_prior(random_model: RandomModel) -> None:
    assert from_header(read_header(random_model("llama"))) is None


def changed(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.update({key: value})


def removed(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda metadata: metadata.pop(key)


def with_one(key: str, value: float) -> Callable[[dict[str, Any]], None]:
    def change(metadata: dict[str, Any]) -> None:
        metadata[key] = metadata[key].copy()
        metadata[key][7 % len(metadata[key])] = value

    return change


MEAN = "coreinfer.activation.mean"
SQUARE = "coreinfer.activation.mean_square"
NORMALIZED = "coreinfer.activation.normalized_mean_square"
FREQUENCY = "coreinfer.similarity.frequency"
N_ALL = N_FF * N_LAYER

HOSTILE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (changed("coreinfer.version", 2), "version 2"),
    (changed("coreinfer.version", 1.0), "version 1.0"),
    (changed("coreinfer.version", np.ones(1, dtype=np.int32)), "version"),
    (changed("coreinfer.tokens", 0), "coreinfer.tokens"),
    (changed("coreinfer.tokens", 1.5), "coreinfer.tokens"),
    (with_one("coreinfer.neurons", 0), "coreinfer.neurons"),
    (with_one("coreinfer.neurons", -N_FF), "coreinfer.neurons"),
    (with_one("coreinfer.neurons", 2**31 - 1), "elements instead of"),
    (with_one("coreinfer.neurons", N_FF + 1), "elements instead of"),
    (changed("coreinfer.neurons", 5), "coreinfer.neurons"),
    (changed("coreinfer.layers", np.zeros(3, dtype=np.int32)), "coreinfer.layers"),
    (changed(MEAN, np.zeros(N_ALL, dtype=np.int32)), f"{MEAN} is of type i32"),
    (changed(MEAN, np.zeros(N_ALL - 1, dtype=np.float32)), f"{MEAN} has 639 elements"),
    (changed(NORMALIZED, 1.0), NORMALIZED),
    (with_one(MEAN, np.nan), f"{MEAN} holds"),
    (with_one(SQUARE, np.inf), f"{SQUARE} holds"),
    (with_one(SQUARE, -1e-3), f"{SQUARE} holds negative"),
    (with_one(NORMALIZED, -1.0), f"{NORMALIZED} holds negative"),
    (changed("coreinfer.similarity.clusters", 0), "coreinfer.similarity.clusters"),
    (changed("coreinfer.similarity.clusters", 2), FREQUENCY),
    (changed("coreinfer.similarity.clusters", 10**9), "coreinfer.similarity.clusters"),
    (changed("coreinfer.similarity.top_share", 0.0), "coreinfer.similarity.top_share"),
    (changed("coreinfer.similarity.top_share", 1.5), "coreinfer.similarity.top_share"),
    (changed("coreinfer.similarity.top_share", float("nan")), "coreinfer.similarity.top_share"),
    (changed(FREQUENCY, np.zeros(3 * N_ALL, dtype=np.float32)), FREQUENCY),
    *(
        (removed(key), key)
        for key in to_metadata(some_prior())
        if key not in ("coreinfer.version", "coreinfer.similarity.clusters")
    ),
]


@pytest.mark.parametrize(("change", "reason"), HOSTILE)
def test_damaged_statistics_are_one_error_that_names_the_key_and_dense_still_runs(
    change: Callable[[dict[str, Any]], Any], reason: str, written: Callable[..., Path]
) -> None:
    path = written(change)
    with pytest.raises(ModelFileError, match="do not fit the model") as caught:
        from_header(read_header(path))
    assert reason in str(caught.value)
    with pytest.raises(CoreInferError):
        EdgeLLM(path, n_ctx=32)
    with EdgeLLM(path, n_ctx=32, strategy="dense"):
        pass


@pytest.mark.parametrize(
    "ffns",
    [
        [Ffn(i, N_FF, 1) for i in range(N_LAYER - 1)],
        [Ffn(i + 1, N_FF, 1) for i in range(N_LAYER)],
        [Ffn(i, N_FF + 32 * (i == 2), 1) for i in range(N_LAYER)],
    ],
    ids=["fewer", "others", "wider"],
)
def test_the_statistics_of_another_model_are_refused(ffns: list[Ffn]) -> None:
    some_prior().check_fits([Ffn(i, N_FF, 1) for i in range(N_LAYER)])
    with pytest.raises(ModelFileError, match="do not fit the model"):
        some_prior().check_fits(ffns)
