"""The prior in metadata: what is written is read again, and what is damaged is refused by name."""

from __future__ import annotations

import os
import warnings
from binascii import b2a_base64
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coreinfer_edge.calibrate import convert
from coreinfer_edge.choose.prior import Clusters, Gain, Prior, fingerprint, from_header, to_metadata
from coreinfer_edge.choose.statistics import Ffn
from coreinfer_edge.errors import ArgumentError, CoreInferError, ModelFileError
from coreinfer_edge.model.header import read_header
from coreinfer_edge.run.llm import EdgeLLM

RandomModel = Callable[..., Path]

N_FF, N_LAYER = 160, 4


def some_prior(optional: bool = True, n_ff: int = N_FF) -> Prior:
    rng = np.random.default_rng(0)

    def arrays() -> list[Any]:
        return [rng.random(n_ff, dtype=np.float32) for _ in range(N_LAYER)]

    counts = [rng.integers(0, 256, (3, n_ff), dtype=np.uint8) for _ in range(N_LAYER)]
    return Prior(
        layers=list(range(N_LAYER)),
        n_tokens=1000,
        mean=[x - np.float32(0.5) for x in arrays()],
        mean_square=arrays(),
        normalized_mean_square=arrays(),
        down_norms=arrays(),
        **{
            "clusters": Clusters(counts, 0.25),
            "gradient": arrays(),
            "zero_share": rng.random(N_LAYER, dtype=np.float32),
            "sensitivity": rng.random(N_LAYER, dtype=np.float32),
            "low_bits_loss": rng.random(N_LAYER, dtype=np.float32),
            "quality": {0.25: 1.5, 0.5: 0.75},
            "quality_levels": ("full", 3),
            "most_tokens": 256.0,
            "gain": Gain(0.5, 1.0, 0.75, 1.5, 1.25),
        }
        if optional
        else {},
    )


@pytest.fixture
def written(
    random_model: RandomModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """``written(change, optional) -> Path``: a model with the metadata of a prior, changed."""

    def write(
        change: Callable[[dict[str, Any]], Any] = lambda _: None, optional: bool = True
    ) -> Path:
        prior = some_prior(optional)
        header = read_header(random_model("llama"))
        metadata = to_metadata(prior, fingerprint(header))
        change(metadata)
        monkeypatch.setattr(convert, "to_metadata", lambda *_: metadata)
        path = tmp_path / "with-prior.gguf"
        convert.write_with_prior(header, prior, path, overwrite=True)
        return path

    return write


@pytest.mark.parametrize("optional", [True, False])
def test_a_prior_is_read_as_it_was_written(written: Callable[..., Path], optional: bool) -> None:
    prior = from_header(read_header(written(optional=optional)))
    expected = some_prior(optional)
    assert prior is not None
    assert (prior.layers, prior.n_tokens) == (expected.layers, expected.n_tokens)
    assert prior.quality == expected.quality
    assert prior.quality_levels == expected.quality_levels
    assert (prior.most_tokens, prior.gain) == (expected.most_tokens, expected.gain)
    for name in ("mean", "mean_square", "normalized_mean_square", "down_norms", "gradient"):
        actual, arrays = getattr(prior, name), getattr(expected, name)
        assert (actual is None) == (arrays is None)
        for values, wanted in zip(actual or [], arrays or [], strict=True):
            # as bfloat16, which has 8 bits of mantissa
            np.testing.assert_allclose(values, wanted, rtol=2**-8)
            assert values.dtype == np.float32
    if not optional:
        assert prior.clusters is prior.zero_share is prior.sensitivity is None
        return
    assert prior.clusters is not None
    assert expected.clusters is not None
    np.testing.assert_array_equal(prior.zero_share, expected.zero_share)
    np.testing.assert_array_equal(prior.sensitivity, expected.sensitivity)
    assert len(prior.clusters) == 3
    assert prior.clusters.top_share == 0.25
    for counts, wanted in zip(prior.clusters.frequency, expected.clusters.frequency, strict=True):
        np.testing.assert_array_equal(counts, wanted)


@pytest.mark.parametrize(
    ("value", "nearest"),
    [(0.0, 0.0), (-1.5, -1.5), (1 + 2**-8, 1.0), (1 + 3 * 2**-8, 1 + 2**-6), (1e-38, 1e-38)],
)
def test_numbers_are_rounded_to_the_nearest_bfloat16_and_ties_to_even(
    value: float, nearest: float, written: Callable[..., Path]
) -> None:
    mean = [np.full(N_FF, value, dtype=np.float32)] * N_LAYER
    texts = to_metadata(replace(some_prior(), mean=mean), "0" * 64)[MEAN]
    prior = from_header(read_header(written(changed(MEAN, texts))))
    assert prior is not None
    np.testing.assert_allclose(prior.mean[0], nearest, rtol=2**-9)
    if value != 1e-38:
        assert (prior.mean[0] == np.float32(nearest)).all()


def test_a_model_without_statistics_has_no_prior(random_model: RandomModel) -> None:
    assert from_header(read_header(random_model("llama"))) is None


def changed(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.update({key: value})


def removed(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda metadata: metadata.pop(key)


def base64(values: npt.NDArray[Any]) -> str:
    """As the metadata has the numbers of one FFN."""
    return b2a_base64(
        (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2"), newline=False
    ).decode()


def with_one(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(metadata: dict[str, Any]) -> None:
        metadata[key] = metadata[key].copy()
        metadata[key][-1] = value

    return change


MEAN = "coreinfer.activation.mean"
SQUARE = "coreinfer.activation.mean_square"
NORMALIZED = "coreinfer.activation.normalized_mean_square"
ZEROS = "coreinfer.activation.zero_share"
GRADIENT = "coreinfer.gradient.mean_square"
NORM = "coreinfer.down.squared_norm"
SENSITIVITY = "coreinfer.sensitivity"
DENSITY, KL = "coreinfer.quality.density", "coreinfer.quality.kl"
LAYERS, NEURONS = "coreinfer.layers", "coreinfer.neurons"
CLUSTERS = "coreinfer.similarity.clusters"
TOP_SHARE = "coreinfer.similarity.top_share"
FREQUENCY = "coreinfer.similarity.frequency"
MOST_TOKENS = "coreinfer.prior.most_tokens"
GAIN_DENSITY, GAIN_KL = "coreinfer.prior.gain.density", "coreinfer.prior.gain.kl"
LOW_BITS, LEVELS = "coreinfer.sensitivity.2_bits", "coreinfer.quality.levels"
OPTIONAL = (
    "coreinfer.version",
    CLUSTERS,
    GRADIENT,
    ZEROS,
    SENSITIVITY,
    LOW_BITS,
    LEVELS,
    MOST_TOKENS,
)

HOSTILE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (changed("coreinfer.version", 0), "coreinfer.version is 0"),
    (changed("coreinfer.version", 1.0), "coreinfer.version is 1.0"),
    (changed("coreinfer.version", np.ones(1, dtype=np.int32)), "coreinfer.version"),
    (changed("coreinfer.fingerprint", 5), "coreinfer.fingerprint"),
    (changed("coreinfer.fingerprint", "sha256"), "coreinfer.fingerprint"),
    (changed("coreinfer.tokens", 0), "coreinfer.tokens"),
    (changed("coreinfer.tokens", 1.5), "coreinfer.tokens"),
    (with_one(NEURONS, 0), NEURONS),
    (with_one(NEURONS, -N_FF), NEURONS),
    (with_one(NEURONS, 2**31 - 1), "is not the base64 of"),
    (with_one(NEURONS, N_FF + 1), f"{MEAN}[3] is not the base64 of {2 * N_FF + 2} bytes"),
    (changed(NEURONS, 5), NEURONS),
    (changed(LAYERS, np.zeros(3, dtype=np.int32)), LAYERS),
    (changed(LAYERS, np.array([0, 1, 1, 2], dtype=np.int32)), "does not ascend"),
    (changed(LAYERS, np.array([-1, 0, 1, 2], dtype=np.int32)), "does not ascend"),
    (changed(LAYERS, np.array([0, 1, 2, 4], dtype=np.int32)), "does not ascend within 0 .. 3"),
    (changed(LAYERS, np.arange(4, dtype=np.float32)), f"{LAYERS} is of type f32"),
    (changed(MEAN, np.zeros(N_LAYER, dtype=np.float32)), f"{MEAN} is not an array of texts"),
    (changed(MEAN, "AAAA"), f"{MEAN} is not an array of texts"),
    (changed(NORMALIZED, 1.0), NORMALIZED),
    (with_one(MEAN, "A"), "is not the base64 of"),
    (with_one(MEAN, "*" * len(base64(np.zeros(N_FF)))), "is not the base64 of"),
    (with_one(MEAN, base64(np.zeros(N_FF))[:-3] + "***"), f"{MEAN}[3] is no"),
    (with_one(MEAN, base64(np.zeros(N_FF + 32))), "is not the base64 of"),
    (changed(MEAN, [base64(np.zeros(N_FF))] * 5), f"{MEAN} has 5 elements instead of 4"),
    (with_one(MEAN, base64(np.full(N_FF, np.nan))), f"{MEAN} holds a number that is not"),
    (with_one(SQUARE, base64(np.full(N_FF, np.inf))), f"{SQUARE} holds a number that is not"),
    (with_one(SQUARE, base64(np.full(N_FF, -1e-3))), f"{SQUARE} holds numbers outside 0"),
    (with_one(NORMALIZED, base64(np.full(N_FF, -1))), f"{NORMALIZED} holds numbers outside 0"),
    (with_one(NORM, base64(np.full(N_FF, -1))), f"{NORM} holds numbers outside 0"),
    (with_one(GRADIENT, base64(np.full(N_FF, -1))), f"{GRADIENT} holds numbers outside 0"),
    (changed(GRADIENT, 1), f"{GRADIENT} is not an array of texts"),
    (with_one(ZEROS, 1.5), f"{ZEROS} holds numbers outside 0 .. 1"),
    (with_one(ZEROS, np.nan), f"{ZEROS} holds a number that is not finite"),
    (with_one(SENSITIVITY, -1), f"{SENSITIVITY} holds numbers outside 0"),
    (changed(SENSITIVITY, np.ones(3, dtype=np.float32)), f"{SENSITIVITY} has 3 elements"),
    (with_one(LOW_BITS, -1), f"{LOW_BITS} holds numbers outside 0"),
    (changed(LOW_BITS, np.ones(3, dtype=np.float32)), f"{LOW_BITS} has 3 elements"),
    (changed(LEVELS, "full,5"), f"{LEVELS} is 'full,5'"),
    (changed(LEVELS, "3,3"), LEVELS),
    (changed(LEVELS, 3), LEVELS),
    (with_one(DENSITY, 1.5), f"{DENSITY} holds numbers outside 0 .. 1"),
    (with_one(KL, -1), f"{KL} holds numbers outside 0"),
    (changed(KL, np.ones(3, dtype=np.float32)), f"{KL} has 3 elements instead of 2"),
    (changed(MOST_TOKENS, -1.0), MOST_TOKENS),
    (changed(MOST_TOKENS, float("inf")), MOST_TOKENS),
    (changed(MOST_TOKENS, 1), MOST_TOKENS),
    (changed(GAIN_DENSITY, 1.5), GAIN_DENSITY),
    (with_one(GAIN_KL, -1), f"{GAIN_KL} holds numbers outside 0"),
    (changed(GAIN_KL, np.ones(3, dtype=np.float32)), f"{GAIN_KL} has 3 elements instead of 4"),
    (changed(CLUSTERS, 0), CLUSTERS),
    (changed(CLUSTERS, 2), f"{FREQUENCY}[0] is not the base64 of"),
    (changed(CLUSTERS, 10**9), CLUSTERS),
    (changed(TOP_SHARE, 0.0), TOP_SHARE),
    (changed(TOP_SHARE, 1.5), TOP_SHARE),
    (changed(TOP_SHARE, float("nan")), TOP_SHARE),
    (changed(TOP_SHARE, 1), TOP_SHARE),
    (changed(FREQUENCY, np.zeros(3 * N_FF, dtype=np.float32)), FREQUENCY),
    *((removed(key), key) for key in to_metadata(some_prior(), "0" * 64) if key not in OPTIONAL),
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


# --- what can be ignored safely -------------------------------------------------------------------


def test_statistics_of_a_later_version_are_ignored_with_one_warning(
    written: Callable[..., Path],
) -> None:
    path = written(changed("coreinfer.version", 2))
    with pytest.warns(RuntimeWarning, match="version 2, and this package reads 1") as caught:
        assert from_header(read_header(path)) is None
    assert len(caught) == 1


def test_statistics_made_for_other_weights_are_ignored_with_one_warning(
    written: Callable[..., Path], random_model: RandomModel
) -> None:
    other = fingerprint(read_header(random_model("llama", seed=1)))
    path = written(changed("coreinfer.fingerprint", other))
    with pytest.warns(RuntimeWarning, match="made for other FFN weights") as caught:
        llm = EdgeLLM(path, n_ctx=32, n_threads=1)
    assert len(caught) == 1
    plain = EdgeLLM(random_model("llama"), n_ctx=32, n_threads=1)
    with llm, plain:
        texts = [x.generate([1, 2, 3, 4], max_tokens=4, temperature=0) for x in (llm, plain)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("strategy", ["static", "similarity"])
def test_a_strategy_that_goes_by_the_statistics_does_not_run_without(
    strategy: str, written: Callable[..., Path]
) -> None:
    path = written(changed("coreinfer.version", 2))
    with (
        pytest.warns(RuntimeWarning, match="are ignored"),
        pytest.raises(ArgumentError, match=f"strategy '{strategy}' needs"),
    ):
        EdgeLLM(path, n_ctx=32, strategy=strategy)


def test_dense_neither_reads_nor_warns(written: Callable[..., Path]) -> None:
    path = written(changed("coreinfer.version", 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EdgeLLM(path, n_ctx=32, strategy="dense").close()


# --- fingerprint ----------------------------------------------------------------------------------


def changed_byte(path: Path, tensor: str, to: Path) -> Path:
    """The model with one byte in the middle of a tensor changed."""
    info = read_header(path).tensors[tensor]
    data = bytearray(path.read_bytes())
    data[info.offset + info.n_bytes // 2] ^= 1
    to.write_bytes(data)
    return to


@pytest.mark.parametrize("part", ["ffn_up.weight", "ffn_gate.weight", "ffn_down.weight"])
def test_the_fingerprint_is_of_the_ffn_weights(
    part: str, random_model: RandomModel, tmp_path: Path
) -> None:
    path = random_model("llama")
    other = changed_byte(path, f"blk.3.{part}", tmp_path / "other.gguf")
    assert fingerprint(read_header(other)) != fingerprint(read_header(path))


def test_the_fingerprint_is_of_nothing_but_the_ffn(
    random_model: RandomModel, written: Callable[..., Path], tmp_path: Path
) -> None:
    path = random_model("llama")
    expected = fingerprint(read_header(path))
    other = changed_byte(path, "blk.3.attn_q.weight", tmp_path / "other.gguf")
    assert fingerprint(read_header(other)) == expected
    assert fingerprint(read_header(written())) == expected  # other metadata


def test_models_of_other_types_and_shapes_have_other_fingerprints(
    random_model: RandomModel,
) -> None:
    models = [
        random_model("llama"),
        random_model("llama", seed=1),
        random_model("llama", "q8_0"),
        random_model("llama", n_layer=2),
        random_model("gpt2"),
    ]
    assert len({fingerprint(read_header(path)) for path in models}) == len(models)


# --- fuzzing --------------------------------------------------------------------------------------


def coreinfer_bytes(path: Path) -> tuple[int, int]:
    """Where the coreinfer.* metadata lies in the file."""
    fields = [f for f in gguf.GGUFReader(path).fields.values() if f.name.startswith("coreinfer.")]
    first = min(field.offset for field in fields)
    last = max(field.offset + sum(part.nbytes for part in field.parts) for field in fields)
    return first, last


@pytest.fixture(scope="module")
def fuzzed(random_model: RandomModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    source = read_header(random_model("llama"))
    convert.write_with_prior(source, some_prior(), path)
    return path


Edits = list[tuple[int, int, int]]


def edits(most: int) -> st.SearchStrategy[Edits]:
    """Where (of 2^20), which bits, and how many bytes."""
    one = st.tuples(st.integers(0, 2**20), st.integers(1, 255), st.integers(1, 9))
    return st.lists(one, min_size=1, max_size=most)


@settings(
    max_examples=int(os.environ.get("COREINFER_FUZZ_EXAMPLES", "150")),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(changes=edits(4))
def test_whatever_the_metadata_holds_the_reader_gives_a_prior_none_or_one_error_of_ours(
    changes: Edits, fuzzed: Path
) -> None:
    data = bytearray(fuzzed.read_bytes())
    first, last = coreinfer_bytes(fuzzed)
    for where, bits, n in changes:
        start = first + where * (last - first) // 2**20
        for i in range(start, min(start + n, last)):
            data[i] ^= bits
    path = fuzzed.with_name("changed.gguf")
    path.write_bytes(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            prior = from_header(read_header(path))
    except CoreInferError:
        return
    if prior is not None:
        every = [*prior.mean, *prior.mean_square, *prior.normalized_mean_square, *prior.down_norms]
        assert [len(array) for array in prior.mean] == [N_FF] * N_LAYER
        assert all(np.isfinite(array).all() for array in every)
        prior.check_fits([Ffn(layer, N_FF, 1) for layer in prior.layers])
