"""gpu_memory= and rpc=: where the model goes, that the plan holds, and that the text is the same.

Without a GPU the device is the processor behind an RPC server. A build for a GPU tests that one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from on_device import EXTRA, EXTRA_CUBLAS, MIB, TIMEOUT, device_addresses, run
from rpc_server import rpc_server

from coreinfer_edge import EdgeLLM
from coreinfer_edge.binding.core import devices
from coreinfer_edge.errors import ArgumentError

pytestmark = pytest.mark.slow

N_LAYERS = 10

# float32 products of a GPU have 10 bits of mantissa in their inputs (TF32).
TOLERANCE = 1e-2 if devices() else 1e-4

# By hand or by night, on a real GPU: more of them.
BUDGETS = [(9, None), (12, 0.2), (16, None), (20, 0.6), (30, None)]
if devices():
    BUDGETS = [(m, d) for m in (9, 12, 14, 16, 20, 24, 30) for d in (None, 0.2, 0.6)]


@pytest.fixture(scope="module")
def rpc() -> Iterator[list[str]]:
    with device_addresses() as addresses:
        yield addresses


@pytest.fixture(scope="module")
def wide(random_model: Any) -> Path:
    """Mostly FFN."""
    path: Path = random_model(
        "llama", "q4_0", n_layer=N_LAYERS, n_embd=256, n_ff=3072, n_head=4, n_head_kv=2, n_ctx=512
    )
    return path


@pytest.fixture(scope="module")
def exact(random_model: Any) -> Path:
    """In float32, whose products round alike in all layouts."""
    path: Path = random_model(
        "llama", "f32", n_layer=6, n_embd=256, n_ff=2048, n_head=4, n_head_kv=2, n_ctx=512
    )
    return path


def test_a_core_set_on_a_device_gives_the_text_of_the_processor(
    exact: Path, rpc: list[str]
) -> None:
    options = {"density": 0.5, "warmup": 2, "rpc": rpc, "repack": False, "levels": ["full"]}
    here, there = run(exact, **options), run(exact, **options, n_gpu_layers=-1)

    assert there["answers"] == here["answers"]
    assert there["core_bytes"] == here["core_bytes"]
    assert there["device"][0] > here["device"][0] == 0


@pytest.mark.parametrize("strategy", ["energy", "griffin", "stability"])
def test_statistics_on_a_device_are_those_of_the_processor(
    exact: Path, rpc: list[str], strategy: str
) -> None:
    names = ["sum", "sum_sq", "normalized_sq", "top"]
    # Without a warm-up, whose tokens would count and can be others where rounding differs. In equal
    # batches: of each, the last layer computes only the token whose logits are wanted. And with
    # equal attention: a plan has flash attention.
    options = {"density": 0.5, "strategy": strategy, "rpc": rpc, "warmup": 0, "n_batch": 256}
    options |= {"flash_attn": True, "more": {"statistics": names}}
    here = run(exact, **options, repack=False)
    for placed in ({"n_gpu_layers": -1}, {"gpu_memory": EXTRA_CUBLAS + 40 * MIB}):
        there = run(exact, **options, **placed)
        for name in names:
            for a, b in zip(here["statistics"][name], there["statistics"][name], strict=True):
                scale = max(1e-6, float(np.abs(a).max()))
                np.testing.assert_allclose(np.array(b) / scale, np.array(a) / scale, atol=TOLERANCE)


def test_a_model_that_fits_goes_to_the_gpu_as_a_whole(wide: Path, rpc: list[str]) -> None:
    result = run(wide, gpu_memory=EXTRA + 500 * MIB, rpc=rpc)

    plan = result["plan"]
    assert plan["n_gpu_layers"] == N_LAYERS + 1
    assert (plan["ffn_on_host"], plan["core"], plan["density"]) == (False, 0, 1.0)
    assert result["last"]["core_tokens"] == 0


def test_ffns_stay_behind_where_only_core_sets_fit(exact: Path, rpc: list[str]) -> None:
    options = {"density": 0.3, "rpc": rpc, "warmup": 2, "levels": ["full"], "flash_attn": True}
    whole = run(exact, **options, n_gpu_layers=-1)
    result = run(exact, **options, gpu_memory=EXTRA_CUBLAS + 40 * MIB)

    plan = result["plan"]
    assert plan["ffn_on_host"]
    assert plan["n_gpu_layers"] == plan["n_layers"] + 1
    assert plan["weights"] == result["device"][0] < whole["device"][0] / 2
    # the layers that stay dense too: decoding would fetch them for each token
    assert result["core_bytes"] == whole["core_bytes"]
    assert result["answers"] == whole["answers"]


# Both ways to verify, whatever the device: each pass takes the other one.
VERIFY = """
import sys
from coreinfer_edge import EdgeLLM
from coreinfer_edge.run import core_llama
from coreinfer_edge.run.exact import Pace, WherePasses

class InTurns(WherePasses):
    n = 0
    def on_gpu(self):
        InTurns.n += 1
        return InTurns.n % 2 == 1

Pace.pays = Pace.may_pay = True
Pace.next_pays = Pace.verifying_pays = lambda pace, likely: likely > 0.05
path, budget, *rpc = sys.argv[1:]
texts = []
for options in ({"strategy": "dense"}, {"exact": True, "density": 0.5, "levels": ["full"]}):
    with EdgeLLM(path, gpu_memory=int(budget), rpc=rpc, n_ctx=512, **options) as llm:
        llm.llama._where_passes = InTurns()
        prompt = [7919 * i % 300 + 10 for i in range(100)]
        texts.append(llm.generate(prompt, max_tokens=40, temperature=0))
assert llm.last.drafted > 0 and InTurns.n > 4, (llm.last, InTurns.n)
assert texts[0] == texts[1], texts
"""


def test_passes_of_exact_decoding_verify_on_either_side_of_the_bus(
    exact: Path, rpc: list[str]
) -> None:
    command = [sys.executable, "-c", VERIFY, str(exact), str(EXTRA_CUBLAS + 40 * MIB), *rpc]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("mebibytes", "density"), BUDGETS)
def test_what_is_taken_is_what_was_planned(
    wide: Path, rpc: list[str], mebibytes: int, density: float | None
) -> None:
    result = run(wide, gpu_memory=EXTRA + mebibytes * MIB, density=density, rpc=rpc)

    if "error" in result:
        assert result["error"] == "MemoryBudgetError"
        assert "What would fit: gpu_memory of" in result["message"]
        assert mebibytes < 12
        return
    plan = result["plan"]
    weights, _packed, cache, compute = result["device"]
    assert (plan["weights"], plan["cache"]) == (weights, cache)
    assert compute <= plan["compute"]
    assert plan["total"] <= plan["budget"]
    if plan["n_gpu_layers"] > N_LAYERS and plan["ffn_on_host"]:
        assert result["core_bytes"] <= plan["core"] <= 1.1 * result["core_bytes"] + EXTRA
        assert result["last"]["density"] == pytest.approx(plan["density"], abs=0.02)


def test_a_plan_has_flash_attention_unless_told_otherwise(wide: Path, rpc: list[str]) -> None:
    options: dict[str, Any] = {"gpu_memory": EXTRA_CUBLAS + 500 * MIB, "n_batch": 512, "rpc": rpc}
    flash, other = (run(wide, **options, **more) for more in ({}, {"flash_attn": False}))

    assert flash["device"][3] < other["device"][3]  # no matrix of all tokens by all tokens


def test_a_density_that_nobody_named_is_not_a_poor_one(wide: Path, rpc: list[str]) -> None:
    result = run(wide, gpu_memory=EXTRA + 12 * MIB, rpc=rpc)

    assert result["plan"]["density"] >= 0.7
    assert 1 < result["plan"]["n_gpu_layers"] <= N_LAYERS


def test_density_auto_keeps_to_what_the_gpu_has_room_for(wide: Path, rpc: list[str]) -> None:
    result = run(wide, gpu_memory=EXTRA + 20 * MIB, density="auto", rpc=rpc)

    assert result["last"]["core_tokens"] > 0
    assert result["last"]["density"] <= result["plan"]["density"] + 0.01


@pytest.mark.parametrize("options", [{"quality": 0.5}, {"strategy": "energy"}, {"exact": True}])
def test_options_without_a_density_run_beside_a_budget(
    wide: Path, rpc: list[str], options: dict[str, Any]
) -> None:
    for mebibytes in (20, 500):
        result = run(wide, gpu_memory=EXTRA + mebibytes * MIB, rpc=rpc, **options)
        assert "error" not in result, result
        assert result["plan"]["total"] <= result["plan"]["budget"]


def test_a_core_set_is_refreshed_beside_a_budget(wide: Path, rpc: list[str]) -> None:
    result = run(wide, gpu_memory=EXTRA + 20 * MIB, density=0.3, refresh=8, rpc=rpc)

    assert result["last"]["refreshes"] >= 2


def test_a_server_that_goes_away_in_the_middle_is_one_error(wide: Path) -> None:
    script = """
import os, signal, sys
from coreinfer_edge import CoreInferError, EdgeLLM
llm = EdgeLLM(sys.argv[1], density=0.5, n_gpu_layers=-1, n_ctx=512, rpc=sys.argv[2])
try:
    for i, piece in enumerate(llm.llama.generate([5, 6, 7, 8], temp=0.0)):
        if i == 3:
            os.kill(int(sys.argv[3]), signal.SIGKILL)
        if i == 300:
            print("still there")
            break
except CoreInferError as error:
    print(f"{type(error).__name__}: {error}")
llm.close()
"""
    with rpc_server() as (address, server):
        command = [sys.executable, "-c", script, str(wide), address, str(server.pid)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"NativeError: a server of rpc={address} does not answer")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere", "", "127.0.0.1:notaport"])
def test_an_address_without_a_server_is_an_error(wide: Path, address: str) -> None:
    with pytest.raises(ArgumentError, match="rpc"):
        EdgeLLM(wide, rpc=[address])


@pytest.mark.skipif(bool(devices()), reason="there is a GPU")
def test_gpu_memory_needs_a_gpu(wide: Path) -> None:
    with pytest.raises(ArgumentError, match="gpu_memory needs a GPU"):
        EdgeLLM(wide, gpu_memory="1GiB")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpu_memory": "lots"}, "gpu_memory is 'lots'"),
        ({"gpu_memory": "1GiB", "n_gpu_layers": 3}, "n_gpu_layers does not go with gpu_memory"),
        ({"gpu_memory": "1GiB,lots"}, "gpu_memory is 'lots'"),
        ({"gpu_memory": []}, "gpu_memory is empty"),
    ],
)
def test_arguments_that_do_not_go_with_a_budget_are_refused(
    wide: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ArgumentError, match=said):
        EdgeLLM(wide, **options)
