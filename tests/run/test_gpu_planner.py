"""How many layers a plan gives to a GPU, with invented figures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coreinfer_edge.binding.core import Device
from coreinfer_edge.errors import MemoryBudgetError
from coreinfer_edge.model.source import header_of
from coreinfer_edge.run import gpu_planner
from coreinfer_edge.run.gpu_planner import GpuPlanner
from coreinfer_edge.run.planning import PlanRequest

N_LAYERS = 32


@pytest.mark.parametrize(
    ("most_on_gpu", "least_on_gpu", "found"),
    [(30, 25, 30), (5, 2, 5), (30, 30, 30), (24, 25, None)],
)
def test_with_main_memory_short_more_layers_are_tried(
    most_on_gpu: int,
    least_on_gpu: int,
    found: int | None,
    random_model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path: Path = random_model("llama", "q4_0", n_layer=N_LAYERS, n_embd=32, n_ff=32)
    monkeypatch.setattr(gpu_planner, "devices", lambda: [Device("CPU0", "a GPU", 1 << 30, 1 << 30)])
    request = PlanRequest(header=header_of(path), llama_kwargs={"n_ctx": 64}, density=0.5)
    planner = GpuPlanner(request, "1GiB", memory="1GiB")

    def shared_out(n: int, _n_devices: int, _place: str) -> Any:
        device = SimpleNamespace(fits=n <= most_on_gpu)
        fits = device.fits and n >= least_on_gpu
        return SimpleNamespace(fits=fits, devices=(device,), n_gpu_layers=n)

    monkeypatch.setattr(planner, "_shared_out", shared_out)
    monkeypatch.setattr(planner, "_refusal", lambda _: "no")
    if found is None:
        with pytest.raises(MemoryBudgetError):
            planner.plan()
    else:
        assert planner.plan().n_gpu_layers == found
