"""Calibration and the file that carries its result."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from reference import Reference

from coreinfer_edge.binding.load import BINDING_DIR
from coreinfer_edge.calibrate import native
from coreinfer_edge.calibrate.convert import write_with_prior
from coreinfer_edge.calibrate.native import (
    GAIN_DENSITY,
    MEASURED_DENSITIES,
    MOST_TOKENS,
    SENTENCE,
    calibrate,
    cluster,
)
from coreinfer_edge.choose.prior import Prior, from_header
from coreinfer_edge.choose.strategies import TOP_SHARE
from coreinfer_edge.errors import ArgumentError, ModelFileError
from coreinfer_edge.model.header import GGUFArray, GGUFHeader, read_header
from coreinfer_edge.run.llm import EdgeLLM

pytestmark = pytest.mark.slow

RandomModel = Callable[..., Path]
LlamaLogits = Callable[..., NDArray[np.float32]]

TEXT = "The mill stood by the river, and nobody knew who had built it. " * 12


def calibrated(path: Path, **options: int) -> Prior:
    with EdgeLLM(path, strategy="dense", n_threads=1, n_threads_batch=1, n_ctx=64) as llm:
        tokens = llm.llama.tokenize(TEXT.encode(), add_bos=False)
        return calibrate(llm, read_header(path), [tokens], **options)


@pytest.fixture(scope="module")
def prior_of_smollm2(smollm2: Path) -> Prior:
    return calibrated(smollm2, n_tokens=128, n_clusters=2)


# --- calibrate ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden_act", "low", "high"), [(None, 0.0, 0.0), ("relu", 0.3, 0.7)])
def test_the_share_of_zeros_is_that_of_the_activation_function(
    hidden_act: str | None, low: float, high: float, random_model: RandomModel
) -> None:
    prior = calibrated(random_model("llama", hidden_act=hidden_act), n_clusters=0)
    assert prior.zero_share is not None
    assert ((low <= prior.zero_share) & (prior.zero_share <= high)).all()


def test_the_means_are_those_of_the_reference_over_the_windows_of_the_text(
    random_model: RandomModel,
) -> None:
    path = random_model("llama")
    prior = calibrated(path, n_tokens=64, n_clusters=2)
    with EdgeLLM(path, strategy="dense", n_ctx=64) as llm:
        tokens = llm.llama.tokenize(TEXT.encode(), add_bos=False, special=False)
    width = min(512, len(tokens) // SENTENCE * SENTENCE)
    activations = Reference(path).activations(tokens[:width])
    assert prior.n_tokens == width
    for i, of_layer in enumerate(activations):
        squares = of_layer**2
        normalized = squares / squares.sum(axis=1, keepdims=True)
        for actual, expected in (
            (prior.mean[i], of_layer.mean(axis=0)),
            (prior.mean_square[i], squares.mean(axis=0)),
            (prior.normalized_mean_square[i], normalized.mean(axis=0)),
        ):
            error = np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))
            # keys and values are kept in half precision here
            assert error < 2e-3


def test_the_frequency_of_a_single_cluster_is_that_of_the_core_neurons_of_the_tokens(
    random_model: RandomModel,
) -> None:
    path = random_model("llama")
    prior = calibrated(path, n_tokens=64, n_clusters=1)
    assert prior.clusters is not None
    assert len(prior.clusters) == 1
    assert prior.clusters.top_share == TOP_SHARE
    for i, frequency in enumerate(prior.clusters.frequency):
        # of n_ff neurons about half are positive, and TOP_SHARE of those are core neurons
        positive = frequency[0].mean() / 255 / TOP_SHARE
        assert 0.3 < positive < 0.7, i


def test_without_clusters_none_are_made(random_model: RandomModel) -> None:
    assert calibrated(random_model("llama"), n_tokens=64, n_clusters=0).clusters is None


def test_of_several_texts_the_beginning_of_each_is_run_and_some_are_held_out(
    random_model: RandomModel,
) -> None:
    path = random_model("llama")
    texts = [[5 + i % 200 for i in range(start, start + 200)] for start in range(16)]
    short = [[5] * (SENTENCE - 1), [5 + i for i in range(SENTENCE + 9)]]
    with EdgeLLM(path, strategy="dense", n_ctx=64) as llm:
        few = calibrate(llm, read_header(path), [*texts[:2], *short], n_clusters=0)
        many = calibrate(llm, read_header(path), texts, n_clusters=0)
    assert few.n_tokens == 2 * 192 + SENTENCE
    assert not few.quality
    assert many.n_tokens == 14 * 192
    assert many.quality


def test_what_the_prior_gains_is_measured_on_text_of_another_kind(
    random_model: RandomModel,
) -> None:
    path = random_model("llama")
    texts = [[5 + i % 200 for i in range(start, start + 200)] for start in range(16)]
    other = [3 + 7 * i % 190 for i in range(400)]
    with EdgeLLM(path, strategy="dense", n_ctx=64) as llm:
        prior = calibrate(llm, read_header(path), texts, n_clusters=0, other=other)
        unmeasured = calibrate(llm, read_header(path), texts, n_clusters=0, other=other[:100])
    assert prior.gain is not None
    assert prior.gain.density == GAIN_DENSITY
    assert min(prior.gain) > 0
    assert prior.most_tokens in MOST_TOKENS
    assert prior.gain.own_with == prior.quality[GAIN_DENSITY]
    assert unmeasured.gain is unmeasured.most_tokens is None
    np.testing.assert_array_equal(unmeasured.mean, prior.mean)


def test_a_prior_that_harms_text_of_another_kind_is_limited_until_it_does_not(
    random_model: RandomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model("llama")
    texts = [[5 + i % 200 for i in range(start, start + 200)] for start in range(16)]
    on_own = [0.9, *np.linspace(0.8, 0.2, len(MEASURED_DENSITIES))]
    on_others = [1.0, 1.2, 1.1, 0.9, 1.0, 1.0], [1.0, 1.4, 1.3, 1.2, 1.1, 1.0]
    measured = iter([on_others[0], on_own, on_others[1], on_own])
    monkeypatch.setattr("coreinfer_edge.calibrate.native._kl_of", lambda *_: next(measured))
    with EdgeLLM(path, strategy="dense", n_ctx=64) as llm:
        limited = calibrate(llm, read_header(path), texts, n_clusters=0, other=texts[0] * 2)
        useless = calibrate(llm, read_header(path), texts, n_clusters=0, other=texts[0] * 2)
    own_with = on_own[1 + MEASURED_DENSITIES.index(GAIN_DENSITY)]
    assert limited.most_tokens == MOST_TOKENS[2]
    assert limited.gain == (GAIN_DENSITY, 0.9, own_with, 1.0, 0.9)
    assert useless.most_tokens == MOST_TOKENS[3] == 0
    assert limited.sensitivity is not None
    assert useless.sensitivity is None  # they alone made it worse
    assert useless.gain == (GAIN_DENSITY, 0.9, own_with, 1.0, 1.0)


def test_a_prior_that_nothing_is_left_of_chooses_as_without_one(
    random_model: RandomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model("llama", n_layer=6)
    texts = [[5 + i % 200 for i in range(start, start + 200)] for start in range(16)]
    kl_of = native._kl_of

    def harmful(*arguments: Any) -> list[float]:
        without, *others = kl_of(*arguments)
        if len(others) != len(MOST_TOKENS) + 1:
            return [without, *others]
        return [without, *(without + 1 for _ in MOST_TOKENS), others[-1]]

    monkeypatch.setattr("coreinfer_edge.calibrate.native._kl_of", harmful)
    with EdgeLLM(path, strategy="dense", n_ctx=64) as llm:
        prior = calibrate(llm, read_header(path), texts, n_clusters=0, other=texts[0] * 2)
    assert prior.gain is not None
    assert prior.gain.other_with == prior.gain.other_without
    assert prior.gain.own_with == prior.gain.own_without


def test_a_text_of_too_few_tokens_is_refused(random_model: RandomModel) -> None:
    path = random_model("llama")
    with (
        EdgeLLM(path, strategy="dense", n_ctx=64) as llm,
        pytest.raises(ArgumentError, match=f"needs at least {SENTENCE}"),
    ):
        calibrate(llm, read_header(path), [[0] * (SENTENCE - 1)])


# --- cluster --------------------------------------------------------------------------------------


def some_sentences() -> list[NDArray[np.uint8]]:
    """Twenty of two kinds, in turn."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 64, (2, 300))
    noise = rng.integers(-3, 4, (20, 300))
    return list(np.clip(kinds[np.arange(20) % 2] + noise, 0, 64).astype(np.uint8))


def test_sentences_of_two_kinds_are_told_apart() -> None:
    groups = cluster(some_sentences(), 2, seed=0)
    assert (groups[::2] == groups[0]).all()
    assert (groups[1::2] == groups[1]).all()
    assert groups[0] != groups[1]


def test_the_same_seed_gives_the_same_groups() -> None:
    for seed in range(3):
        one, other = (cluster(some_sentences(), 5, seed) for _ in range(2))
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("n", [1, 3])
def test_fewer_or_equal_sentences_than_clusters_are_grouped_all_the_same(n: int) -> None:
    assert len(cluster(some_sentences()[:n], 8, seed=0)) == n
    equal = [np.ones(10, dtype=np.uint8)] * n
    assert (cluster(equal, 8, seed=0) == 0).all()
    assert len(cluster([np.zeros(10, dtype=np.uint8)] * n, 8, seed=0)) == n


# --- write_with_prior -----------------------------------------------------------------------------


def assert_same_tensors(one: GGUFHeader, other: GGUFHeader) -> None:
    """Byte for byte."""
    assert list(one.tensors) == list(other.tensors)
    with open(one.path, "rb") as a, open(other.path, "rb") as b:
        for name, tensor in one.tensors.items():
            copy = other.tensors[name]
            assert (tensor.type, tensor.shape) == (copy.type, copy.shape)
            a.seek(tensor.offset)
            b.seek(copy.offset)
            assert a.read(tensor.n_bytes) == b.read(copy.n_bytes), name


def assert_same_metadata(one: GGUFHeader, other: GGUFHeader) -> None:
    """But for the statistics."""
    keys = [key for key in other.metadata if not key.startswith("coreinfer.")]
    assert sorted(one.metadata) == sorted(keys)
    for key, value in one.metadata.items():
        copy = other.metadata[key]
        assert one.value_types[key] == other.value_types[key], key
        if isinstance(value, GGUFArray):
            assert isinstance(copy, GGUFArray)
            assert value.type == copy.type
            np.testing.assert_array_equal(np.array(value.read()), np.array(copy.read()))
        else:
            assert value == copy, key


@pytest.mark.parametrize("type", ["f16", "q4_k", "q8_0"])
def test_tensors_and_other_metadata_stay_as_they_are(
    type: str, random_model: RandomModel, tmp_path: Path
) -> None:
    path = random_model("llama", type, shape="small", n_layer=2)
    prior = calibrated(path, n_tokens=64, n_clusters=2)
    write_with_prior(read_header(path), prior, tmp_path / "out.gguf")
    before, after = read_header(path), read_header(tmp_path / "out.gguf")
    assert_same_tensors(before, after)
    assert_same_metadata(before, after)


def test_a_real_model_with_its_tokenizer_stays_as_it_is_and_computes_the_same(
    smollm2: Path, prior_of_smollm2: Prior, tmp_path: Path, llama_logits: LlamaLogits
) -> None:
    path = tmp_path / "smollm2.gguf"
    write_with_prior(read_header(smollm2), prior_of_smollm2, path)
    assert_same_tensors(read_header(smollm2), read_header(path))
    assert_same_metadata(read_header(smollm2), read_header(path))
    tokens = list(range(100, 130))
    np.testing.assert_array_equal(llama_logits(smollm2, tokens), llama_logits(path, tokens))
    with EdgeLLM(path, strategy="similarity", n_ctx=64, n_threads=1) as llm:
        llm.generate(tokens, max_tokens=4, temperature=0)


STOCK = "COREINFER_STOCK_LIB"
LOGITS = """
import sys
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=1, logits_all=True, verbose=False)
model.eval(list(range(100, 130)))
sys.stdout.buffer.write(model.scores[:30].tobytes())
"""


@pytest.mark.skipif(STOCK not in os.environ, reason=f"{STOCK} names no stock build of libllama")
def test_unpatched_llama_cpp_computes_the_same_from_the_converted_file(
    smollm2: Path, prior_of_smollm2: Prior, tmp_path: Path
) -> None:
    path = tmp_path / "smollm2.gguf"
    write_with_prior(read_header(smollm2), prior_of_smollm2, path)
    environment = {
        **os.environ,
        "LLAMA_CPP_LIB_PATH": os.environ[STOCK],
        "PYTHONPATH": str(BINDING_DIR.parent),
    }
    before, after = (
        subprocess.run(
            [sys.executable, "-c", LOGITS, model],
            env=environment,
            check=True,
            capture_output=True,
            timeout=300,
        ).stdout
        for model in (smollm2, path)
    )
    assert len(before) > 30 * 4 * 1000
    assert before == after


def test_older_statistics_are_replaced(random_model: RandomModel, tmp_path: Path) -> None:
    path = random_model("llama")
    write_with_prior(read_header(path), calibrated(path, n_clusters=2), tmp_path / "1.gguf")
    newer = calibrated(path, n_clusters=0)
    write_with_prior(read_header(tmp_path / "1.gguf"), newer, tmp_path / "2.gguf")
    prior = from_header(read_header(tmp_path / "2.gguf"))
    assert prior is not None
    assert prior.clusters is None
    np.testing.assert_allclose(prior.mean[1], newer.mean[1], rtol=2**-8)
    keys = list(gguf.GGUFReader(tmp_path / "2.gguf").fields)
    assert len(keys) == len(set(keys))


def test_the_same_input_and_seed_give_the_same_bytes(
    random_model: RandomModel, tmp_path: Path
) -> None:
    path = random_model("llama")
    files = [tmp_path / "1.gguf", tmp_path / "2.gguf"]
    for file in files:
        write_with_prior(read_header(path), calibrated(path, n_clusters=3, seed=7), file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_nothing_of_the_user_s_is_overwritten_unasked(
    random_model: RandomModel, tmp_path: Path
) -> None:
    path = random_model("llama")
    header, prior = read_header(path), calibrated(path, n_clusters=0)
    before = path.read_bytes()
    output = tmp_path / "out.gguf"
    output.write_text("mine")
    for refused, overwrite, reason in (
        (output, False, "exists"),
        (path, True, "is the model itself"),
        (tmp_path, True, "is a folder"),
        (tmp_path / "no" / "out.gguf", False, "is not a folder"),
    ):
        with pytest.raises(ArgumentError, match=reason):
            write_with_prior(header, prior, refused, overwrite)
    assert output.read_text() == "mine"
    assert path.read_bytes() == before
    write_with_prior(header, prior, output, overwrite=True)
    assert from_header(read_header(output)) is not None


def test_metadata_that_cannot_be_written_is_one_error(
    random_model: RandomModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model("llama")
    prior = calibrated(path, n_clusters=0)

    def fail(*_: object) -> None:
        raise ValueError("Empty array")

    monkeypatch.setattr(gguf.GGUFWriter, "write_kv_data_to_file", fail)
    with pytest.raises(ModelFileError, match="cannot be written again: Empty array"):
        write_with_prior(read_header(path), prior, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_no_half_file(
    random_model: RandomModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model("llama")
    prior = calibrated(path, n_clusters=0)
    output = tmp_path / "out.gguf"
    output.write_text("mine")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(ModelFileError, match=r"out\.gguf cannot be written: No space left"):
        write_with_prior(read_header(path), prior, output, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]
    assert output.read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_the_new_file_has_the_permissions_of_any_new_file(
    random_model: RandomModel, tmp_path: Path
) -> None:
    path = random_model("llama")
    write_with_prior(read_header(path), calibrated(path, n_clusters=0), tmp_path / "out.gguf")
    (tmp_path / "other").touch()
    assert (tmp_path / "out.gguf").stat().st_mode == (tmp_path / "other").stat().st_mode
