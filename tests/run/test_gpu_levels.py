"""Levels of precision on a device, in ggml's own types.

Without a GPU the device is the processor behind an RPC server.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from on_device import EXTRA, MIB, TIMEOUT, device_addresses, run
from reference import Reference
from test_reference import relative_error, some_tokens

from coreinfer_edge.binding.core import column_type, devices, level_bytes, rounded_on_device
from coreinfer_edge.choose.statistics import LEVELS
from coreinfer_edge.errors import ArgumentError

pytestmark = pytest.mark.slow

RandomModel = Callable[..., Path]

# What rounding activations to 8 bits may change.
NEAR = 0.05

# Neurons of a level below full come in multiples of this.
BLOCK = 256

# Computes logits with the core sets of a file, in a process that may see a device.
SCRIPT = """
import sys
import numpy as np
from core_session import core_session
from coreinfer_edge.binding.core import devices, add_rpc_server
from coreinfer_edge.choose.statistics import CoreSet
path, given, out, at_once, *rpc = sys.argv[1:]
for address in rpc:
    add_rpc_server(address)
given = np.load(given)
fills = {int(name[5:]): given[name] for name in given if name.startswith("fill_")}
with core_session(path, n_gpu_layers=-1) as session:
    session.core.set_core({
        i: CoreSet(given[f"neurons_{i}"], fills.get(i), given[f"levels_{i}"])
        for i in range(len(session.core.ffns)) if f"neurons_{i}" in given
    })
    session.core.use_core(True)
    logits = session.run(given["tokens"].tolist(), int(at_once) or None)
    np.savez(out, logits=logits, errors=session.core.ffns[0].errors)
"""


@pytest.fixture(scope="module")
def rpc() -> Iterator[list[str]]:
    with device_addresses() as addresses:
        yield addresses


def mixed(n_ff: int, seed: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Neurons of each level, none of which has a multiple of 32."""
    rng = np.random.default_rng(seed)
    level = rng.choice([-1, 0, 1, 2, 3], n_ff, p=[0.2, 0.1, 0.2, 0.2, 0.3])
    kept = np.flatnonzero(level >= 0)
    return kept.astype(np.int32), level[kept].astype(np.uint8)


def hold(reference: Reference, i: int, neurons: Any, levels: Any) -> None:
    """Let a layer of the reference have the weights that a core set on a device holds."""
    n_ff = reference.weight(f"blk.{i}.ffn_down").shape[1]
    for name in ("gate", "up"):
        if f"blk.{i}.ffn_{name}.weight" not in reference.tensors:
            continue
        weights = reference.weight(f"blk.{i}.ffn_{name}")
        stored = int(reference.tensors[f"blk.{i}.ffn_{name}.weight"].tensor_type)
        for first in range(0, len(weights), n_ff):  # gate and up fused have two rows for a neuron
            for neuron, level in zip(neurons, levels, strict=True):
                if level > 0:
                    row = weights[first + neuron].astype(np.float32)
                    weights[first + neuron] = rounded_on_device(LEVELS[level], row, stored)
    down = reference.weight(f"blk.{i}.ffn_down")
    stored = int(reference.tensors[f"blk.{i}.ffn_down.weight"].tensor_type)
    full = GGMLQuantizationType(column_type(stored))
    for level in range(len(LEVELS)):
        of_level = neurons[levels == level]
        if not len(of_level):
            continue
        block = BLOCK if level > 0 else 32
        kept = np.zeros((len(down), -(-len(of_level) // block) * block), dtype=np.float32)
        kept[:, : len(of_level)] = down[:, of_level]
        if level > 0:
            rows = [rounded_on_device(LEVELS[level], row, stored, columns=True) for row in kept]
            kept = np.stack(rows)
        else:
            kept = dequantize(quantize(kept, full), full)
        down[:, of_level] = kept[:, : len(of_level)]


# Widths of whole super-blocks; of blocks of 64 and of 32 alone; gate and up fused; biases.
MODELS: dict[str, dict[str, Any]] = {
    "wide": {"arch": "llama", "n_embd": 256, "n_ff": 1024},
    "narrow": {"arch": "llama", "n_embd": 192, "n_ff": 1024, "n_head": 6, "n_head_kv": 3},
    "fused": {"arch": "phi3", "n_embd": 256, "n_ff": 1024},
    "biased": {"arch": "starcoder2", "n_embd": 256, "n_ff": 1024},
}


@pytest.mark.parametrize("at_once", [1, 0])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_reference_with_the_same_weights(
    name: str, at_once: int, random_model: RandomModel, rpc: list[str], tmp_path: Path
) -> None:
    model = random_model(type="q8_0", n_layer=3, **MODELS[name])
    tokens = some_tokens()
    rng = np.random.default_rng(5)
    cores = {i: mixed(1024, i) for i in (0, 2)}
    fill = rng.normal(size=1024).astype(np.float32) / 10
    given: dict[str, Any] = {"tokens": np.array(tokens), "fill_2": fill}
    for i, (neurons, levels) in cores.items():
        given |= {f"neurons_{i}": neurons, f"levels_{i}": levels}
    np.savez(tmp_path / "given.npz", **given)
    arguments = [str(model), str(tmp_path / "given.npz"), str(tmp_path / "out.npz"), str(at_once)]
    path = f"import sys; sys.path[:0] = {[p for p in sys.path if 'tests' in p]!r}\n"
    command = [sys.executable, "-c", path + SCRIPT, *arguments, *rpc]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as out:
        logits, errors = out["logits"], out["errors"]

    reference, of_file = Reference(model), Reference(model)
    for i, of_layer in cores.items():
        hold(reference, i, *of_layer)
    kept = {i: neurons for i, (neurons, _) in cores.items()}
    expected = reference.logits(tokens, kept, {2: fill})
    assert relative_error(logits, expected)[1] < NEAR
    assert relative_error(logits, of_file.logits(tokens, kept, {2: fill}))[1] > 2 * NEAR
    n_matrices = 2 if name == "biased" else 3  # it has no gate
    assert errors[LEVELS.index(4)] == pytest.approx(0.0066 * n_matrices)


def test_rounding_changes_a_row_as_little_as_the_bits_of_the_type_allow() -> None:
    row = np.random.default_rng(0).normal(size=65536).astype(np.float32)

    def error(level: Any, n: int, columns: bool = False) -> float:
        held = rounded_on_device(level, row[:n], int(GGMLQuantizationType.Q8_0), columns)
        return float(((held - row[:n]) ** 2).mean() / (row[:n] ** 2).mean())

    assert error(4, 65536) == pytest.approx(0.0066, rel=0.05)
    assert error(3, 65536) == pytest.approx(0.0206, rel=0.05)
    assert error(2, 65536) == pytest.approx(0.0693, rel=0.05)
    assert error(2, 65472) == pytest.approx(0.143, rel=0.05)  # no multiple of 256
    for value in (0.0, 1e-30, 3.0, -7e4, 1e30):
        same = np.full(256, value, dtype=np.float32)
        for level in (4, 3, 2):
            held = rounded_on_device(level, same, int(GGMLQuantizationType.Q8_0))  # type: ignore[arg-type]
            assert np.isfinite(held).all()
            if abs(value) in (0.0, 3.0):
                np.testing.assert_allclose(held, same, rtol=0.08 if level == 2 else 0.01)
    with pytest.raises(ArgumentError, match="devices have no such rows"):
        rounded_on_device(3, row[:960], int(GGMLQuantizationType.Q4_0))


def test_a_width_without_a_type_of_few_bits_has_the_level_only_where_another_is_smaller() -> None:
    q8_0, q4_0 = int(GGMLQuantizationType.Q8_0), int(GGMLQuantizationType.Q4_0)
    # 3 bits need 256; the four bits of a file cannot become fewer at 576
    assert level_bytes(3, q4_0, 576, on_device=True) == 0
    assert level_bytes(3, q8_0, 576, on_device=True) == level_bytes(4, q8_0, 576, on_device=True)
    assert level_bytes(2, q4_0, 576, on_device=True) == 576 * 2.25 / 8
    assert level_bytes(3, q4_0, 512, on_device=True) == 512 * 3.4375 / 8
    assert level_bytes(2, q4_0, 512, on_device=True) == 512 * 2.625 / 8
    assert level_bytes(2, q4_0, 100, on_device=True) == 0


@pytest.fixture(scope="module")
def wide(random_model: RandomModel) -> Path:
    return random_model(
        "llama", "q8_0", n_layer=6, n_embd=256, n_ff=3072, n_head=4, n_head_kv=2, n_ctx=512
    )


# Buffers on a card are of whole pieces of 2 MiB, as many as a layer of this model has.
small_buffers = pytest.mark.skipif(
    bool(devices()), reason="the model is too small for a GPU's budget"
)


@pytest.mark.parametrize(
    "placed",
    [
        {"n_gpu_layers": -1},
        pytest.param({"gpu_memory": EXTRA + 20 * MIB}, marks=small_buffers),
    ],
)
@pytest.mark.parametrize("levels", [None, ["full", 2], [3, 2]])
def test_an_answer_with_levels_reads_the_bytes_of_the_density(
    levels: list[Any] | None, placed: dict[str, Any], wide: Path, rpc: list[str]
) -> None:
    result = run(wide, density=0.4, rpc=rpc, warmup=0, levels=levels, **placed)

    assert result["last"]["levels"] == (list(LEVELS) if levels is None else levels)
    assert result["last"]["density"] == pytest.approx(0.4, abs=0.03)
    assert result["core_bytes"] == pytest.approx(0.4 * result["full_bytes"], rel=0.06)
    if plan := result["plan"]:
        assert plan["ffn_on_host"]
        assert result["core_bytes"] <= plan["core"]
        assert plan["total"] <= plan["budget"]


@small_buffers
def test_levels_leave_room_for_a_higher_density_of_neurons_than_dropping(
    wide: Path, rpc: list[str]
) -> None:
    budget = EXTRA + 27 * MIB // 2
    dropped = run(wide, gpu_memory=budget, levels=["full"], rpc=rpc)
    mixed = run(wide, gpu_memory=budget, rpc=rpc)

    assert dropped["plan"]["n_gpu_layers"] <= 6
    assert mixed["plan"]["n_gpu_layers"] == 7
    assert mixed["last"]["levels"] == list(LEVELS)
    assert mixed["plan"]["density"] >= 0.55


def test_a_second_turn_a_refresh_and_an_estimated_density_have_levels(
    wide: Path, rpc: list[str]
) -> None:
    refreshed = run(wide, density=0.5, refresh=8, warmup=0, n_gpu_layers=-1, rpc=rpc)
    estimated = run(wide, density="auto", quality=0.5, gpu_memory=EXTRA + 24 * MIB, rpc=rpc)

    assert refreshed["last"]["refreshes"] >= 2
    assert refreshed["last"]["levels"] == list(LEVELS)
    assert estimated["last"]["core_tokens"] > 0
    assert estimated["last"]["levels"] == list(LEVELS)


@small_buffers
def test_levels_that_only_a_gpu_has_are_had_where_it_computes_all_layers(
    wide: Path, rpc: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COREINFER_KERNELS", "none")
    options: dict[str, Any] = {"density": 0.7, "levels": ["full", 3], "rpc": rpc, "warmup": 0}
    whole = run(wide, gpu_memory=EXTRA + 20 * MIB, **options)
    small = run(wide, gpu_memory=EXTRA + 11 * MIB, **options)
    without = run(wide, gpu_memory=EXTRA + 11 * MIB, **{**options, "levels": None})

    assert whole["last"]["levels"] == ["full", 3]
    assert small["error"] == "MemoryBudgetError"
    assert "or levels left out" in small["message"]
    assert 2 <= without["plan"]["n_gpu_layers"] <= 6


def test_levels_that_a_width_does_not_allow_are_refused(
    random_model: RandomModel, rpc: list[str]
) -> None:
    odd = random_model("llama", "q4_0", n_embd=192, n_ff=256, n_head=3, n_head_kv=3)
    for placed in ({"n_gpu_layers": -1}, {"gpu_memory": EXTRA + 20 * MIB}):
        result = run(odd, density=0.5, levels=["full", 3], rpc=rpc, **placed)
        assert result["error"] == "ArgumentError"
        assert "rows of a multiple of 256 weights" in result["message"]
        assert run(odd, density=0.5, rpc=rpc, **placed)["last"]["levels"] != list(LEVELS)
