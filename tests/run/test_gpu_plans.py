"""gpu_memory= for several GPUs, and beside memory=: where the model goes, and that it fits there.

Without GPUs these are processors behind RPC servers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from on_device import EXTRA, EXTRA_CUBLAS, IS_CUDA, IS_SOFTWARE, MIB, device_addresses, run

from coreinfer_edge.binding.core import devices
from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.run.gpu_budget import parse_budgets

pytestmark = pytest.mark.slow

N_LAYERS = 10
SCALE = 8 if IS_CUDA else 1
several = pytest.mark.skipif(len(devices()) == 1, reason="there is one GPU")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="weights are streamed on Linux only")


@pytest.fixture(scope="module")
def rpc() -> Iterator[list[str]]:
    with device_addresses(2) as addresses:
        yield addresses


@pytest.fixture(scope="module")
def wide(random_model: Any) -> Path:
    """Mostly FFN."""
    path: Path = random_model(
        "llama", "q4_0", n_layer=N_LAYERS, n_embd=256, n_ff=3072, n_head=4, n_head_kv=2, n_ctx=512
    )
    return path


@pytest.fixture(scope="module")
def large(random_model: Any) -> Path:
    """FFNs that count beside what the process takes itself."""
    path: Path = random_model(
        "llama", "q8_0", n_layer=6, n_embd=512, n_ff=6144, n_head=8, n_head_kv=4, n_ctx=512
    )
    return path


def in_mib(*sizes: float) -> list[int]:
    return [EXTRA + int(size * MIB) for size in sizes]


def check_devices(result: dict[str, Any]) -> None:
    """Each GPU has what was planned for it, and that is within its budget."""
    for planned, (weights, _packed, cache, compute) in zip(
        result["plan"]["devices"], result["devices"], strict=False
    ):
        assert (planned["weights"], planned["cache"]) == (weights, cache)
        assert compute <= planned["compute"]
        assert planned["total"] <= planned["budget"]
    # exact decoding that does not pay has no core set in force
    in_force = result["core_bytes"] < result["full_bytes"]
    if in_force and result["plan"]["n_gpu_layers"] > result["plan"]["n_layers"]:
        assert result["core_bytes"] <= result["plan"]["core"]


# --- several GPUs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(random_model: Any, wide: Path) -> Path:
    """As wide. A GPU of NVIDIA's gives each layer's core set 2 MiB or more: all is larger there."""
    sizes = {"n_embd": 512, "n_ff": 12288, "n_head": 4, "n_head_kv": 2, "n_ctx": 512}
    path: Path = random_model("llama", "q4_0", n_layer=N_LAYERS, **sizes) if IS_CUDA else wide
    return path


@several
@pytest.mark.parametrize(
    ("sizes", "density", "place"),
    [
        ((9, 7), None, "host"),
        ((9,), None, "host"),
        ((5, 12), 0.5, "host"),
        ((40, 16), 0.3, "device"),
    ],
)
def test_layers_are_shared_out_by_what_each_gpu_has_room_for(
    shared: Path, rpc: list[str], sizes: tuple[int, ...], density: float | None, place: str
) -> None:
    if IS_CUDA and density is None:
        pytest.skip("where core sets of that density fit, in 2 MiB each, the model fits")
    budgets = in_mib(*(SCALE * size for size in sizes))
    result = run(shared, gpu_memory=budgets, density=density, rpc=rpc)

    plan = result["plan"]
    assert plan["ffn"] == place
    assert sum(device["n_layers"] for device in plan["devices"]) == N_LAYERS + 1
    assert all(device["n_layers"] > 0 for device in plan["devices"])
    check_devices(result)


@several
def test_the_text_over_two_gpus_is_that_of_one(random_model: Any, rpc: list[str]) -> None:
    # in float32, which rounds alike in batches of any size
    sizes = {"n_layer": 6, "n_embd": 256, "n_ff": 2048, "n_head": 4, "n_head_kv": 2, "n_ctx": 512}
    model = random_model("llama", "f32", **sizes)
    options: dict[str, Any] = {"density": 0.4, "levels": ["full"], "rpc": rpc, "warmup": 0}
    one = run(model, gpu_memory=[EXTRA_CUBLAS + 40 * MIB, MIB], **options)
    two = run(model, gpu_memory=[EXTRA_CUBLAS + 24 * MIB] * 2, **options)

    assert len(one["plan"]["devices"]) == 1
    assert all(device["n_layers"] > 0 for device in two["plan"]["devices"])
    assert two["plan"]["n_gpu_layers"] == 7
    assert two["answers"] == one["answers"]
    assert two["core_bytes"] == one["core_bytes"]


@several
def test_a_model_that_fits_on_one_gpu_leaves_the_others_alone(wide: Path, rpc: list[str]) -> None:
    result = run(wide, gpu_memory=in_mib(500), rpc=rpc)

    assert len(result["plan"]["devices"]) == 1
    assert result["devices"][1] == [0, 0, 0, 0]


@several
def test_gpus_without_room_for_all_layers_have_the_last_ones(shared: Path, rpc: list[str]) -> None:
    result = run(shared, gpu_memory=in_mib(4 * SCALE), rpc=rpc)

    assert 1 < result["plan"]["n_gpu_layers"] <= N_LAYERS
    check_devices(result)


@several
def test_a_refusal_names_each_gpu_that_has_too_little(wide: Path, rpc: list[str]) -> None:
    result = run(wide, gpu_memory=in_mib(1), rpc=rpc)

    assert result["error"] == "MemoryBudgetError"
    assert result["message"].count("What would fit: gpu_memory of") == 2


def test_more_budgets_than_gpus_are_refused(wide: Path, rpc: list[str]) -> None:
    result = run(wide, gpu_memory=in_mib(*range(9, 40)), rpc=rpc)

    assert result["error"] == "ArgumentError"
    assert re.search(r"gpu_memory has 31 sizes for \d+ GPUs", result["message"])


def test_budgets_are_one_or_several_sizes() -> None:
    assert parse_budgets("3GiB, 2GiB") == [3 << 30, 2 << 30]
    assert parse_budgets(["auto", 5]) == ["auto", 5]
    assert parse_budgets("auto") == ["auto"]
    for wrong in ("", "1GiB,", [None], [[]], "1GiB;2GiB"):
        with pytest.raises(ArgumentError, match="gpu_memory is"):
            parse_budgets(wrong)  # type: ignore[arg-type]


# --- a budget of main memory too -----------------------------------------------------------------


def least_memory(path: Path, **options: Any) -> int:
    """The main memory that a refusal says would be enough."""
    refused = run(path, memory=MIB, **options)
    assert refused["error"] == "MemoryBudgetError"
    named = re.search(r"What would fit: memory of ([\d,]+) MiB", refused["message"])
    assert named is not None
    return int(named[1].replace(",", "")) * MIB


@on_linux
@pytest.mark.parametrize("options", [{}, {"exact": True, "levels": ["full"]}])
def test_ffns_that_fit_into_no_memory_are_read_from_the_file(
    large: Path, rpc: list[str], options: dict[str, Any]
) -> None:
    given = {"density": 0.4, "gpu_memory": in_mib(55)[0], "rpc": rpc[:1], "n_batch": 128}
    options = {**given, **options}
    least = least_memory(large, **options)
    result = run(large, **options, memory=least)
    roomy = run(large, **options, memory=least + 400 * MIB)

    plan = result["plan"]
    assert (plan["ffn"], roomy["plan"]["ffn"]) == ("file", "host")
    assert result["last"]["streamed_bytes"] >= result["full_bytes"]
    assert roomy["last"]["streamed_bytes"] == 0
    check_devices(result)
    for each in (result, roomy):
        assert IS_SOFTWARE or each["peak"] <= each["plan"]["host"]["budget"]
    if not devices():  # there a large product is computed elsewhere, and rounds differently
        assert result["answers"] == roomy["answers"]


def test_without_a_core_set_main_memory_counts_none(wide: Path, rpc: list[str]) -> None:
    options: dict[str, Any] = {"memory": "4GiB", "rpc": rpc[:1]}
    for none in ({"strategy": "dense"}, {"density": None}):
        host = run(wide, gpu_memory=in_mib(500)[0], **none, **options)["plan"]["host"]
        assert (host["core"], host["statistics"]) == (0, 0)
    host = run(wide, gpu_memory=in_mib(12)[0], density=0.5, **options)["plan"]["host"]
    assert min(host["core"], host["statistics"]) > 0


@on_linux
def test_a_refusal_says_which_memory_is_too_small(large: Path, rpc: list[str]) -> None:
    main = run(large, density=0.4, gpu_memory=in_mib(55)[0], memory=MIB, rpc=rpc[:1])
    both = run(large, density=0.4, gpu_memory=in_mib(1)[0], memory=MIB, rpc=rpc[:1])

    assert "of main memory" in main["message"]
    assert "gpu_memory of" not in main["message"]
    assert "of main memory" in both["message"]
    assert "gpu_memory of" in both["message"]
