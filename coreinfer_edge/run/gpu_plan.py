"""Where a model with budgets of the memory of GPUs lies, and what it takes there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from coreinfer_edge.binding.placement import FfnPlace
from coreinfer_edge.choose.statistics import Level
from coreinfer_edge.run.gpu_host_plan import HostPlan


@dataclass(frozen=True)
class DevicePlan:
    """What a model will take of one GPU, in bytes.

    Attributes:
        name: of the GPU.
        budget: what it may take.
        source: what sets the budget: the argument, or the GPU.
        n_layers: layers that the GPU computes; the output counts as one.
        driver: what CUDA takes besides, 0 if the budget leaves it out.
        weights: those on the GPU.
        cache: keys and values.
        compute: buffers of the largest graph, FFN weights on their way among them.
        statistics: of the activations.
        core: the core sets.
    """

    name: str
    budget: int
    source: str
    n_layers: int
    driver: int
    weights: int
    cache: int
    compute: int
    statistics: int
    core: int

    @property
    def total(self) -> int:
        parts = (self.weights, self.cache, self.compute, self.statistics, self.core)
        return self.driver + sum(parts)

    @property
    def fits(self) -> bool:
        return self.total <= self.budget

    def as_dict(self) -> dict[str, Any]:
        """The plan in types that JSON has."""
        return {**dataclasses.asdict(self), "total": self.total, "fits": self.fits}


@dataclass(frozen=True)
class GpuPlan:
    """Where a model will lie.

    Attributes:
        devices: what it takes of each GPU, in the order of their layers.
        n_layers: layers of the model.
        ffn: where the FFN weights lie: ``"device"``, or with only core sets on the GPUs ``"host"``
            or ``"file"``.
        levels: the levels that neurons of a core set can have.
        density: fraction of FFN neurons to keep, or with levels of the bytes of their weights; 1.0
            if there is no core set.
        n_ctx: context in tokens.
        n_batch: tokens that a graph evaluates at once.
        host: what the model takes of main memory; None without a budget for that.
    """

    devices: tuple[DevicePlan, ...]
    n_layers: int
    ffn: FfnPlace
    levels: tuple[Level, ...]
    density: float
    n_ctx: int
    n_batch: int
    host: HostPlan | None = None

    @property
    def memory_budget(self) -> int | None:
        """What main memory may be taken; None without a budget for that."""
        return None if self.host is None else self.host.budget

    @property
    def n_gpu_layers(self) -> int:
        """Layers that GPUs compute, and one more for the output."""
        return sum(device.n_layers for device in self.devices)

    @property
    def ffn_on_host(self) -> bool:
        """Whether GPUs have only core sets of the FFNs."""
        return self.ffn != "device"

    @property
    def core(self) -> int:
        """Bytes of the core sets on all GPUs."""
        return sum(device.core for device in self.devices)

    @property
    def total(self) -> int:
        return sum(device.total for device in self.devices)

    @property
    def fits(self) -> bool:
        on_devices = all(device.fits for device in self.devices)
        return on_devices and (self.host is None or self.host.fits)

    def as_dict(self) -> dict[str, Any]:
        """The plan in types that JSON has: sums over the GPUs, and each of them."""
        sums = {name: sum(getattr(device, name) for device in self.devices) for name in _SIZES}
        return {
            **dataclasses.asdict(self),
            **sums,
            "devices": [device.as_dict() for device in self.devices],
            "host": self.host and self.host.as_dict(),
            "n_gpu_layers": self.n_gpu_layers,
            "ffn_on_host": self.ffn_on_host,
            "total": self.total,
            "fits": self.fits,
        }


_SIZES = ("budget", "driver", "weights", "cache", "compute", "statistics", "core")
