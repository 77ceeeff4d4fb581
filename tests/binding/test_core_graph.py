"""The core graph computes what the dense graph does with the other activations at zero or fill.

Errors are relative to the standard deviation of the logits; ``pytest -rP`` prints them. In F32 the
largest is about 1.1e-6 for SiLU. ggml's GELU goes through a half-precision table, where a last bit
that differs may be rounded either way, so the GELU architectures are also compared with llama.cpp's
own dense graph on a copy whose sums run in the same order: that one must be equal to 1e-6.
With quantised types, llama.cpp's rounding of activations is what remains (see test_reference.py).
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from core_session import Logits, core_session
from make_random_gguf import RELUS
from reference import ARCHS, Core, Fill, Reference
from test_reference import (
    F32_TOLERANCE,
    GELU_MAX_TOLERANCE,
    HAS_GELU,
    Q8_TOLERANCE,
    TYPE_TOLERANCE,
    TYPES,
    assert_equal_in_f32,
    relative_error,
    some_tokens,
)

RandomModel = Callable[..., Path]

# What quantising the gathered columns of down again adds to the tolerance of a type, in rms.
REQUANTIZATION = {"q4_0": 4e-2, "q4_1": 4e-2, "q4_k": 4e-2, "iq4_nl": 4e-2}

# A file that no test changes is dequantised once.
reference = functools.lru_cache(maxsize=8)(Reference)


def some_core(path: Path, size: int | None = None, first: int = 1, seed: int = 1) -> Core:
    """Random neurons of every layer from ``first`` on; without ``size``, another number of each."""
    model = reference(path)
    rng = np.random.default_rng(seed)
    return {
        i: np.sort(rng.permutation(model.n_ff)[: size or model.n_ff * (3 + i) // 11])
        for i in range(first, model.n_layer)
    }


def some_fill(path: Path, core: Core) -> Fill:
    """Another value for every neuron, of the size that activations have."""
    model = reference(path)
    rng = np.random.default_rng(2)
    spread = [a.std() for a in model.activations(some_tokens(8))]
    return {i: (spread[i] * rng.standard_normal(model.n_ff)).astype(np.float32) for i in core}


def moved(core: Core, n_ff: int, n: int = 1) -> Core:
    """The core set with ``n`` of the neurons of each layer exchanged for others."""
    result = {}
    for i, neurons in core.items():
        others = np.setdiff1d(np.arange(n_ff), neurons)[:n]
        result[i] = np.sort(np.concatenate([neurons[len(others) :], others]))
    return result


# --- F32, against the reference -------------------------------------------------------------------


@pytest.mark.parametrize("filled", [False, True], ids=["zero", "fill"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", ARCHS)
def test_core_logits_in_f32_equal_those_of_the_reference(
    arch: str, tied: bool, filled: bool, random_model: RandomModel
) -> None:
    path = random_model(arch, tied=tied)
    tokens, core = some_tokens(), some_core(path)
    fill = some_fill(path, core) if filled else None
    with core_session(path) as session:
        actual = session.use(core, fill).run(tokens)
    assert_equal_in_f32(arch, actual, reference(path).logits(tokens, core, fill))


@pytest.mark.parametrize("filled", [False, True], ids=["zero", "fill"])
def test_core_logits_of_a_gated_ffn_with_biases_equal_those_of_the_reference(
    filled: bool, random_model: RandomModel
) -> None:
    path = random_model("llama", bias=True)
    tokens, core = some_tokens(), some_core(path)
    fill = some_fill(path, core) if filled else None
    with core_session(path) as session:
        actual = session.use(core, fill).run(tokens)
    assert_equal_in_f32("llama", actual, reference(path).logits(tokens, core, fill))


@pytest.mark.parametrize("filled", [False, True], ids=["zero", "fill"])
@pytest.mark.parametrize("hidden_act", RELUS)
def test_core_logits_of_a_llama_with_relu_equal_those_of_the_reference(
    hidden_act: str, filled: bool, random_model: RandomModel
) -> None:
    path = random_model("llama", hidden_act=hidden_act)
    tokens, core = some_tokens(), some_core(path)
    fill = some_fill(path, core) if filled else None
    with core_session(path) as session:
        dense = session.run(tokens)
        actual = session.restart().use(core, fill).run(tokens)
    assert_equal_in_f32("llama", dense, reference(path).logits(tokens))
    assert_equal_in_f32("llama", actual, reference(path).logits(tokens, core, fill))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_single_wrong_neuron_a_layer_or_a_missing_fill_is_far_outside_the_tolerance(
    arch: str, random_model: RandomModel
) -> None:
    path = random_model(arch)
    model, tokens, core = reference(path), some_tokens(), some_core(path)
    fill = some_fill(path, core)
    expected = model.logits(tokens, core, fill)
    with core_session(path) as session:
        for wrong, values in ((moved(core, model.n_ff), fill), (core, None)):
            actual = session.restart().use(wrong, values).run(tokens)
            assert relative_error(actual, expected)[1] > 0.02


@pytest.mark.parametrize("arch", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 64, 127, 159])
def test_a_core_set_of_any_size_equals_the_reference(
    size: int, arch: str, random_model: RandomModel
) -> None:
    path = random_model(arch)
    tokens, core = some_tokens(12), some_core(path, size, first=0)
    fill = some_fill(path, core)
    with core_session(path) as session:
        actual = session.use(core, fill).run(tokens)
    assert_equal_in_f32(arch, actual, reference(path).logits(tokens, core, fill))


@pytest.mark.parametrize("n_ff", [1, 7, 100])
def test_an_ffn_narrower_than_or_across_a_block_equals_the_reference(
    n_ff: int, random_model: RandomModel
) -> None:
    path = random_model("llama", n_ff=n_ff)
    tokens = some_tokens(12)
    with core_session(path) as session:
        for size in {1, n_ff // 2 + 1, n_ff}:
            core = some_core(path, size, first=0)
            fill = some_fill(path, core)
            actual = session.restart().use(core, fill).run(tokens)
            assert_equal_in_f32("llama", actual, reference(path).logits(tokens, core, fill))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_core_set_of_all_neurons_equals_the_dense_graph_whatever_the_fill(
    arch: str, random_model: RandomModel
) -> None:
    path = random_model(arch)
    model, tokens = reference(path), some_tokens()
    everything = {i: np.arange(model.n_ff) for i in range(model.n_layer)}
    with core_session(path) as session:
        dense = session.run(tokens)
        for fill in (None, some_fill(path, everything)):
            actual = session.restart().use(everything, fill).run(tokens)
            assert relative_error(actual, dense)[0] < 1e-6


# --- F32, against llama.cpp's dense graph ---------------------------------------------------------


def write_core_first(path: Path, out: Path, core: Core, fill: Fill | None = None) -> None:
    """Copy an F32 model so that its dense graph sums what the core graph does, in the same order.

    In every FFN the neurons kept come first, in their order. The columns of the others are zero,
    and what ``fill`` would have brought through them is in the bias of ffn_down.
    """
    shutil.copyfile(path, out)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out, "r+").tensors}
    for i, kept in core.items():
        ffn = {
            name.removeprefix(f"blk.{i}.ffn_"): data
            for name, data in tensors.items()
            if name.startswith(f"blk.{i}.ffn_")
        }
        down = ffn["down.weight"]
        others = np.setdiff1d(np.arange(down.shape[1]), kept)
        if fill is not None:
            ffn["down.bias"][:] += down[:, others] @ fill[i][others]
        order = np.concatenate([kept, others])
        down[:] = down[:, order]
        down[:, len(kept) :] = 0
        for name in ("up.weight", "up.bias", "gate.weight", "gate.bias"):
            if name in ffn:
                ffn[name][:] = ffn[name][order]


@pytest.mark.parametrize(
    ("arch", "filled"),
    [
        *((arch, False) for arch in ("llama", *HAS_GELU)),
        ("llama", True),
        ("gpt2", True),
        ("starcoder2", True),
    ],
)
def test_core_logits_equal_those_of_a_dense_copy_with_the_core_neurons_first(
    arch: str, filled: bool, random_model: RandomModel, tmp_path: Path
) -> None:
    path = random_model(arch, bias=True) if arch == "llama" else random_model(arch)
    # Multiples of 64: zeros behind the core then fall into no sum that it has a part in.
    tokens, core = some_tokens(), some_core(path, 64)
    fill = some_fill(path, core) if filled else None
    write_core_first(path, tmp_path / "first.gguf", core, fill)
    with core_session(path) as session, core_session(tmp_path / "first.gguf") as copy:
        actual = session.use(core, fill).run(tokens)
        expected = copy.run(tokens)
    tolerance = 1e-6
    if filled:  # the model's bias and what the fill adds are summed up in another order
        tolerance = GELU_MAX_TOLERANCE if arch in HAS_GELU else F32_TOLERANCE
    assert relative_error(actual, expected)[0] < tolerance


# --- quantised types ------------------------------------------------------------------------------


def assert_equal_for_type(
    path: Path, type: str, actual: Logits, core: Core, fill: Fill | None
) -> None:
    """Within the tolerance of the type, and many times closer than to another core set."""
    model, tokens = reference(path), some_tokens(16)
    _, error = relative_error(actual, model.logits(tokens, core, fill))
    _, wrong = relative_error(actual, model.logits(tokens, moved(core, model.n_ff, 100), fill))
    assert error < TYPE_TOLERANCE.get(type, Q8_TOLERANCE) + REQUANTIZATION.get(type, 0.0)
    assert wrong > 7 * error


@pytest.mark.parametrize(
    ("arch", "filled"), [("llama", False), ("gpt2", True)], ids=["gated-zero", "plain-fill"]
)
@pytest.mark.parametrize("type", TYPES)
def test_core_logits_of_every_type_equal_the_reference_to_its_rounding(
    type: str, arch: str, filled: bool, random_model: RandomModel
) -> None:
    path = random_model(arch, type, shape="small")
    core = some_core(path)
    fill = some_fill(path, core) if filled else None
    with core_session(path) as session:
        actual = session.use(core, fill).run(some_tokens(16))
    assert_equal_for_type(path, type, actual, core, fill)


@pytest.mark.parametrize("type", ["q8_0", "q4_0", "q4_k"])
def test_core_logits_of_quantised_gate_and_up_in_one_tensor_equal_the_reference(
    type: str, random_model: RandomModel
) -> None:
    path = random_model("phi3", type, shape="small")
    core = some_core(path)
    fill = some_fill(path, core)
    with core_session(path) as session:
        actual = session.use(core, fill).run(some_tokens(16))
    assert_equal_for_type(path, type, actual, core, fill)


@pytest.mark.parametrize(
    ("type", "tensor_types"),
    [
        ("q4_k", {"ffn_down": "q6_k"}),  # as in Q4_K_M
        ("q4_0", {"ffn_up": "q8_0", "ffn_gate": "f16"}),
        ("q4_0", {"blk.2": "bf16", "blk.3": "f32"}),
    ],
    ids=["down", "up-and-gate", "by-layer"],
)
def test_core_logits_of_mixed_types_equal_the_reference(
    type: str, tensor_types: dict[str, str], random_model: RandomModel
) -> None:
    path = random_model("llama", type, shape="small", tensor_types=tensor_types)
    core = some_core(path)
    with core_session(path) as session:
        actual = session.use(core).run(some_tokens(16))
    assert_equal_for_type(path, type, actual, core, None)


@pytest.mark.parametrize("type", ["q4_0", "q8_0", "q4_k"])
def test_single_tokens_and_batches_of_a_quantised_core_equal_the_reference(
    type: str, random_model: RandomModel
) -> None:
    path = random_model("llama", type, shape="small")
    core = some_core(path)
    with core_session(path) as session:
        session.use(core)
        for at_once in (1, 3):
            actual = session.restart().run(some_tokens(16), at_once)
            assert_equal_for_type(path, type, actual, core, None)


# --- in a session ---------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 5, None], ids=["token-by-token", "batches", "one-batch"])
@pytest.mark.parametrize("arch", ARCHS)
def test_core_logits_after_a_dense_prompt_equal_those_of_the_reference(
    arch: str, at_once: int | None, random_model: RandomModel
) -> None:
    path = random_model(arch)
    tokens, start, core = some_tokens(36), 20, some_core(path)
    fill = some_fill(path, core)
    with core_session(path) as session:
        dense = session.run(tokens[:start])
        actual = session.use(core, fill).run(tokens[start:], at_once)
    model = reference(path)
    expected = model.logits(tokens, core, fill, core_from=start)
    assert_equal_in_f32(arch, dense, expected[:start])
    assert_equal_in_f32(arch, actual, expected[start:])
    # The prompt's cache is dense: it matters.
    assert relative_error(actual, model.logits(tokens, core, fill)[start:])[1] > 0.05


@pytest.mark.parametrize("type", ["f32", "q4_0"])
def test_every_core_set_of_a_changing_session_gives_what_it_gives_a_fresh_context(
    type: str, random_model: RandomModel
) -> None:
    path = random_model("llama", type)
    n_ff = reference(path).n_ff
    # The same sizes, so that graphs look alike; then others; then other layers.
    first, same_sizes = some_core(path, 70), some_core(path, 70, seed=2)
    other_sizes, other_layers = some_core(path), {0: np.arange(33), 2: np.array([n_ff - 1])}
    fill = some_fill(path, first)
    segments: list[tuple[Core | None, Fill | None]] = [
        (None, None),
        (first, None),
        (same_sizes, None),
        (None, None),
        (first, None),
        (first, fill),
        (first, {i: 2 * values for i, values in fill.items()}),
        (first, None),
        (other_sizes, None),
        (other_layers, None),
        (same_sizes, fill),
        ({}, None),
        (first, None),
    ]
    tokens = some_tokens(3 * len(segments))
    seen = []
    with core_session(path) as session:
        for i, (core, fill) in enumerate(segments):
            part = tokens[3 * i : 3 * i + 3]
            state = session.llama.save_state()
            if core is None:
                session.core.use_core(False)
            else:
                session.use(core, fill)
            actual = session.run(part, 1)
            with core_session(path) as fresh:
                fresh.llama.load_state(state)
                if core is not None:
                    fresh.use(core, fill)
                expected = fresh.run(part, 1)
            np.testing.assert_array_equal(actual, expected)
            seen.append(actual)
    assert len({logits.tobytes() for logits in seen}) == len(segments)


def test_the_dense_graph_after_a_core_set_is_the_one_before_it_bit_for_bit(
    random_model: RandomModel,
) -> None:
    path = random_model("llama", "q4_0")
    tokens = some_tokens()
    with core_session(path) as session:
        dense = session.run(tokens, 1)
        session.restart().use(some_core(path)).run(tokens, 1)
        session.core.use_core(False)
        np.testing.assert_array_equal(session.restart().run(tokens, 1), dense)
        session.core.use_core(True)
        assert relative_error(session.restart().run(tokens, 1), dense)[1] > 0.1
        session.core.set_core({})
        np.testing.assert_array_equal(session.restart().run(tokens, 1), dense)


def test_a_core_set_chosen_again_and_again_stays_exact(random_model: RandomModel) -> None:
    path = random_model()
    tokens = some_tokens(6)
    with core_session(path) as session:
        for seed in range(12):
            core = some_core(path, 1 + 13 * seed, first=seed % 3, seed=seed)
            actual = session.restart().use(core).run(tokens, 1 + seed % 2)
            assert_equal_in_f32("llama", actual, reference(path).logits(tokens, core))


def test_a_layer_whose_core_set_stays_is_kept_when_others_change(random_model: RandomModel) -> None:
    path = random_model()
    tokens, core = some_tokens(8), some_core(path)
    with core_session(path) as session:
        session.use(core).run(tokens)
        other = {**core, 2: np.arange(5)}
        actual = session.restart().use(other).run(tokens)
        assert_equal_in_f32("llama", actual, reference(path).logits(tokens, other))
        del other[1]
        actual = session.restart().use(other).run(tokens)
        assert_equal_in_f32("llama", actual, reference(path).logits(tokens, other))


def test_gathering_with_several_threads_gives_the_same_core(random_model: RandomModel) -> None:
    from coreinfer_edge.binding.core import CoreContext

    path = random_model("llama", "q4_0", shape="small")
    tokens, core = some_tokens(8), some_core(path)
    with core_session(path) as session:
        one = session.use(core, some_fill(path, core)).run(tokens)
        session.core.close()
        session.core = CoreContext(session.llama.ctx, [path], n_threads=5)
        five = session.restart().use(core, some_fill(path, core)).run(tokens)
    np.testing.assert_array_equal(five, one)
