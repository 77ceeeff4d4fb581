"""The reference agrees with llama.cpp, dense and with neurons left out.

Errors are relative to the standard deviation of the logits. In F32 the largest is about 1.3e-6
(printed by ``pytest -rP``), except that ggml's GELU goes through a half-precision table: a last bit
that differs before it may be rounded either way, and one such neuron in a thousand makes 1e-3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from reference import ARCHS, Core, Reference, write_without_neurons

pytestmark = pytest.mark.slow

RandomModel = Callable[..., Path]
LlamaLogits = Callable[[Path, Sequence[int]], NDArray[np.float32]]

HAS_GELU = ("gemma3", "gpt2", "starcoder2")
F32_TOLERANCE = 1e-4
GELU_MAX_TOLERANCE, GELU_RMS_TOLERANCE = 3e-3, 2e-4
# llama.cpp rounds activations to the type that a matrix multiplies with: F16, BF16, or Q8_0 (Q8_K,
# one scale for 256 values, with the K types).
TYPE_TOLERANCE = {"f16": 2e-3, "bf16": 1.5e-2, "q4_k": 6e-2, "q5_k": 6e-2, "q6_k": 6e-2}
Q8_TOLERANCE = 4e-2
TYPES = ("f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k", "iq4_nl")


def some_tokens(n: int = 32) -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(4, 320, n)]


def some_core(path: Path, density: float = 0.4) -> Core:
    """Random neurons of every layer but the first."""
    model = Reference(path)
    rng = np.random.default_rng(1)
    n_core = round(density * model.n_ff)
    return {i: rng.permutation(model.n_ff)[:n_core] for i in range(1, model.n_layer)}


def relative_error(
    actual: NDArray[np.float32], expected: NDArray[np.float32]
) -> tuple[float, float]:
    """Largest and root-mean-square difference, in standard deviations of the logits."""
    assert actual.shape == expected.shape
    difference = (actual - expected) / expected.std()
    largest, rms = float(np.abs(difference).max()), float(np.sqrt(np.mean(difference**2)))
    print(f"largest {largest:.1e}, rms {rms:.1e}")
    return largest, rms


def assert_equal_in_f32(
    arch: str, actual: NDArray[np.float32], expected: NDArray[np.float32]
) -> None:
    largest, rms = relative_error(actual, expected)
    if arch in HAS_GELU:
        assert largest < GELU_MAX_TOLERANCE
        assert rms < GELU_RMS_TOLERANCE
    else:
        assert largest < F32_TOLERANCE


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", ARCHS)
def test_dense_logits_in_f32_equal_those_of_llama_cpp(
    arch: str, tied: bool, random_model: RandomModel, llama_logits: LlamaLogits
) -> None:
    path = random_model(arch, tied=tied)
    tokens = some_tokens()
    assert_equal_in_f32(arch, Reference(path).logits(tokens), llama_logits(path, tokens))


def test_dense_logits_of_llama_with_biases_equal_those_of_llama_cpp(
    random_model: RandomModel, llama_logits: LlamaLogits
) -> None:
    path = random_model("llama", bias=True)
    tokens = some_tokens()
    assert_equal_in_f32("llama", Reference(path).logits(tokens), llama_logits(path, tokens))


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
def test_heads_of_another_size_than_n_embd_over_n_head_equal_those_of_llama_cpp(
    arch: str, random_model: RandomModel, llama_logits: LlamaLogits
) -> None:
    path = random_model(arch, n_embd=96, n_ff=96, n_head=6, n_head_kv=3, head_dim=32)
    tokens = some_tokens()
    assert_equal_in_f32(arch, Reference(path).logits(tokens), llama_logits(path, tokens))


def test_the_windowed_layers_of_gemma3_do_not_see_tokens_before_the_window(
    random_model: RandomModel,
) -> None:
    windowed = Reference(random_model("gemma3", sliding_window=4, sliding_window_pattern=9))
    tokens = some_tokens()
    others = [tokens[0] + 1, *tokens[1:]]
    difference = np.abs(windowed.logits(tokens) - windowed.logits(others)).max(axis=1)
    n_reached = 4 * (4 - 1) + 1  # each of 4 layers hands a token 3 positions on
    assert (difference[:n_reached] > 0).all()
    assert (difference[n_reached:] == 0).all()


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_dense_logits_of_every_type_equal_those_of_llama_cpp_to_its_activation_rounding(
    arch: str, type: str, random_model: RandomModel, llama_logits: LlamaLogits
) -> None:
    path = random_model(arch, type, shape="small")
    tokens = some_tokens(16)
    _, rms = relative_error(Reference(path).logits(tokens), llama_logits(path, tokens))
    assert rms < TYPE_TOLERANCE.get(type, Q8_TOLERANCE)


@pytest.mark.parametrize("arch", ARCHS)
def test_core_logits_equal_those_of_llama_cpp_with_the_other_down_columns_zeroed(
    arch: str, random_model: RandomModel, llama_logits: LlamaLogits, tmp_path: Path
) -> None:
    path = random_model(arch)
    tokens, core = some_tokens(), some_core(path)
    write_without_neurons(path, tmp_path / "without.gguf", core)
    actual = Reference(path).logits(tokens, core)
    assert_equal_in_f32(arch, actual, llama_logits(tmp_path / "without.gguf", tokens))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_fill_equals_llama_cpp_with_the_fill_moved_into_the_down_bias(
    arch: str, random_model: RandomModel, llama_logits: LlamaLogits, tmp_path: Path
) -> None:
    path = random_model(arch, bias=True)
    tokens, core = some_tokens(), some_core(path)
    fill = {i: a.mean(axis=0) for i, a in enumerate(Reference(path).activations(tokens))}
    write_without_neurons(path, tmp_path / "filled.gguf", core, fill)
    actual = Reference(path).logits(tokens, core, fill)
    assert_equal_in_f32(arch, actual, llama_logits(tmp_path / "filled.gguf", tokens))
    assert relative_error(actual, Reference(path).logits(tokens, core))[0] > 0.1


@pytest.mark.parametrize("arch", ARCHS)
def test_a_core_set_that_starts_later_sees_the_dense_cache_of_the_tokens_before(
    arch: str, random_model: RandomModel, tmp_path: Path
) -> None:
    from llama_cpp import GGML_TYPE_F32, Llama

    path = random_model(arch)
    tokens, core, start = some_tokens(), some_core(path), 20
    write_without_neurons(path, tmp_path / "without.gguf", core)

    def load(path: Path) -> Llama:
        return Llama(
            str(path),
            n_ctx=64,
            n_threads=1,
            logits_all=True,
            flash_attn=False,
            type_k=GGML_TYPE_F32,
            type_v=GGML_TYPE_F32,
            verbose=False,
        )

    dense, without = load(path), load(tmp_path / "without.gguf")
    dense.eval(tokens[:start])
    without.load_state(dense.save_state())
    without.eval(tokens[start:])
    expected = without.scores[start : len(tokens)].copy()
    dense.close()
    without.close()

    actual = Reference(path).logits(tokens, core, core_from=start)
    assert_equal_in_f32(arch, actual[start:], expected)
    assert (actual[:start] == Reference(path).logits(tokens)[:start]).all()
    # The dense cache matters: a run with the core set from the first token differs.
    assert relative_error(Reference(path).logits(tokens, core)[start:], expected)[0] > 0.01


@pytest.mark.parametrize("arch", ARCHS)
def test_a_core_set_of_all_neurons_changes_nothing(arch: str, random_model: RandomModel) -> None:
    model = Reference(random_model(arch))
    tokens = some_tokens(8)
    everything = {i: np.arange(model.n_ff) for i in range(model.n_layer)}
    assert (model.logits(tokens, everything) == model.logits(tokens)).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_activations_are_what_a_fill_of_them_reproduces(
    arch: str, random_model: RandomModel
) -> None:
    model = Reference(random_model(arch))
    tokens = some_tokens(1)
    activations = model.activations(tokens)
    assert [a.shape for a in activations] == [(1, model.n_ff)] * model.n_layer
    nothing = {i: np.array([], dtype=int) for i in range(model.n_layer)}
    filled = model.logits(tokens, nothing, {i: a[0] for i, a in enumerate(activations)})
    assert (filled == model.logits(tokens)).all()


def test_a_real_model_has_the_logits_that_llama_cpp_gives_it(
    smollm2: Path, llama_logits: LlamaLogits
) -> None:
    tokens = [504, 3575, 282, 4649, 314, 7042, 30, 657, 314]
    actual = Reference(smollm2, dtype=np.float32).logits(tokens)
    expected = llama_logits(smollm2, tokens)
    assert relative_error(actual, expected)[1] < 0.1
    assert (actual.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.8


@pytest.mark.parametrize("arch", ["mamba", "qwen3moe"])
def test_a_model_without_a_dense_ffn_is_refused(arch: str, random_model: RandomModel) -> None:
    with pytest.raises(ValueError, match=f"no {arch}"):
        Reference(random_model(arch))
