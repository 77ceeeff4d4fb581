"""Plans what a model takes of a GPU's memory, before it is loaded.

If the model fits, all of it goes to the GPU. If not, the weights of its FFNs stay in main memory:
pre-fill sends them across the bus, and decoding has the core set on the GPU, with everything else.
If even that does not fit, the first layers are the processor's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from coreinfer_edge.binding.core import (
    ContextMemory,
    CoreContext,
    Device,
    constants,
    context_memory,
    devices,
)
from coreinfer_edge.binding.placement import DevicePlacement
from coreinfer_edge.choose.chooser import Chooser, n_kept, settled_levels
from coreinfer_edge.choose.prior import Prior
from coreinfer_edge.choose.statistics import Ffn, Level
from coreinfer_edge.errors import (
    ArgumentError,
    MemoryBudgetError,
    UnsupportedModelError,
)
from coreinfer_edge.model.chat_templates import CheckedLlama
from coreinfer_edge.model.ffn import dense_ffn, why_not_dense
from coreinfer_edge.model.header import GGUFHeader
from coreinfer_edge.run.memory_plan import (
    AUTO_MARGIN,
    BATCHES,
    COMPUTE_PART,
    DEFAULT_BATCH,
    batches,
    mebibytes,
    parse_size,
    planning_chooser,
    trial_context,
    wants_all_logits,
)
from coreinfer_edge.run.session import AUTO_TOKENS

# The least that a plan chooses by itself: below, text is another. With less room the GPU has fewer
# layers. With levels a lower density does as little damage (docs/quality.md).
LEAST_DENSITY = 0.7
LEAST_WITH_LEVELS = 0.55

# Left free of what the GPU has ("auto"): a screen, and other programs, may want some.
AUTO_MARGIN_LEAST = 128 << 20

# Taken by CUDA itself: its context, and then, with the first graph, the code of ggml's kernels,
# cuBLAS and the inputs of products as integers. Measured on an H100 (docs/gpu.md). "auto" need not
# know the first: it asks what is free beside it.
CUDA_BYTES = 530 << 20
CUDA_RUN_BYTES = 240 << 20
# The place among devices() of the GPU that is planned for.
_FIRST = 0

# A buffer is rounded up to this.
CUDA_GRANULARITY = 2 << 20


@dataclass(frozen=True)
class GpuPlan:
    """What a model will take, in bytes of the memory of a GPU.

    Attributes:
        budget: what it may take.
        source: what sets the budget: the argument, or the GPU.
        device: name of the GPU.
        n_gpu_layers: layers that the GPU computes, and one more for the output.
        n_layers: layers of the model.
        ffn_on_host: the FFN weights are in main memory, and only core sets on the GPU.
        levels: the levels that neurons of a core set can have.
        density: fraction of FFN neurons to keep, or with levels of the bytes of their weights; 1.0
            if there is no core set.
        n_ctx: context in tokens.
        n_batch: tokens that a graph evaluates at once.
        driver: what CUDA takes besides, 0 if the budget leaves it out.
        weights: those on the GPU.
        cache: keys and values.
        compute: buffers of the largest graph, FFN weights on their way among them.
        statistics: of the activations.
        core: the core set.
    """

    budget: int
    source: str
    device: str
    n_gpu_layers: int
    n_layers: int
    ffn_on_host: bool
    levels: tuple[Level, ...]
    density: float
    n_ctx: int
    n_batch: int
    driver: int
    weights: int
    cache: int
    compute: int
    statistics: int
    core: int

    @property
    def total(self) -> int:
        return self.core + self.fixed

    @property
    def fixed(self) -> int:
        """All but the core set."""
        return self.driver + self.weights + self.cache + self.compute + self.statistics

    @property
    def fits(self) -> bool:
        return self.total <= self.budget

    def as_dict(self) -> dict[str, Any]:
        """The plan in types that JSON has."""
        return {**dataclasses.asdict(self), "total": self.total, "fits": self.fits}


class _Budget(NamedTuple):
    n_bytes: int
    source: str
    driver: int


def _budget(gpu_memory: int | str, device: Device, driver: int) -> _Budget:
    if gpu_memory == "auto":
        free = device.free - max(AUTO_MARGIN_LEAST, int(AUTO_MARGIN * device.free))
        return _Budget(max(0, free), f"free on {device.description}", 0)
    return _Budget(parse_size(gpu_memory, "gpu_memory"), "gpu_memory", driver)


class GpuPlanner:
    """Plans one model on the first GPU.

    Args:
        header: of the model.
        gpu_memory: the budget: a size, or ``"auto"``.
        density: what the user wants, None for as much as fits.
        strategy: how the core set is chosen; ``"dense"`` for none.
        layers: densities of some layers by number.
        prior: statistics from calibration, if the model has them.
        llama_kwargs: arguments of ``llama_cpp.Llama``, ``model_path`` and ``n_ctx`` among them.
        levels: the levels that neurons can have; None for all that there are where the GPU computes
            all layers, and for keeping or dropping elsewhere.

    Raises:
        ArgumentError: there is no GPU, or the neurons cannot have the levels.
        UnsupportedModelError: the model has no dense FFN.
    """

    def __init__(
        self,
        header: GGUFHeader,
        gpu_memory: int | str,
        density: float | Literal["auto"] | None,
        strategy: str,
        layers: Mapping[int, float] | None,
        prior: Prior | None,
        llama_kwargs: Mapping[str, Any],
        levels: Sequence[Level] | None = None,
    ) -> None:
        found = devices()
        if not found:
            raise ArgumentError(
                "gpu_memory needs a GPU, and this build of the package sees none: see docs/gpu.md"
            )
        self._device = found[_FIRST]
        self._is_cuda = self._device.name.startswith("CUDA")
        self._budget = _budget(gpu_memory, self._device, CUDA_BYTES if self._is_cuda else 0)
        self._header = header
        self._density = density
        self._dense = strategy == "dense"
        self._kwargs = {**llama_kwargs, "packed": False}
        self._ffn = dense_ffn(header)
        if not self._ffn and not self._dense and density is not None:
            raise UnsupportedModelError(
                f"no layer has a dense FFN that a core set can stand for ({why_not_dense(header)})"
            )
        self._dense = self._dense or not self._ffn
        self._levels = levels
        if levels is not None and not self._dense:
            settled_levels(levels, self._ffns(1))
        self._chooser: Chooser | None = None
        if not self._dense:
            self._chooser = planning_chooser(header, strategy, layers, prior)
        self._shares_bytes = prior is not None and prior.low_bits_loss is not None

    def placement(self, plan: GpuPlan) -> DevicePlacement:
        return self._placement(plan.n_gpu_layers, plan.ffn_on_host)

    def _placement(
        self, n_gpu_layers: int, ffn_on_host: bool, without_data: bool = False
    ) -> DevicePlacement:
        compared = AUTO_TOKENS if self._density == "auto" else 1
        n_outputs = 0 if wants_all_logits(self._kwargs) else compared
        return DevicePlacement(n_gpu_layers, ffn_on_host, n_outputs, without_data)

    def plan(self) -> GpuPlan:
        """The plan to go by.

        Raises:
            MemoryBudgetError: nothing fits; says what would.
        """
        n_layers = self._header.n_layers + 1
        whole = self.planned(n_layers, False)
        if whole.fits:
            return whole
        if self._dense:
            best, host = whole, False
        else:
            best, host = self.planned(n_layers, True), True
            if best.fits:
                return best
        # as many layers as there is room for: 1 is the output alone
        fitting: GpuPlan | None = None
        low, high = 1, n_layers - 1
        while low <= high:
            n = (low + high + 1) // 2
            plan = self.planned(n, host)
            if plan.fits:
                fitting, low = plan, n + 1
            else:
                high = n - 1
        if fitting is None or fitting.n_gpu_layers < 2:
            raise MemoryBudgetError(self._refusal(best))
        return fitting

    def planned(self, n_gpu_layers: int, ffn_on_host: bool) -> GpuPlan:
        """The best plan with so many layers on the GPU; it may not fit."""
        plan: GpuPlan | None = None
        placement = self._placement(n_gpu_layers, ffn_on_host, without_data=True)
        without_data = placement.llama_arguments(self._header.files)
        with closing(CheckedLlama(**{**self._kwargs, **without_data, "verbose": False})) as llama:
            for n_batch in batches(self._kwargs, BATCHES[0] if ffn_on_host else DEFAULT_BATCH):
                memory = self._measured(llama, n_batch)
                plan = self._with_density(self._fixed(memory, n_gpu_layers, ffn_on_host, n_batch))
                small = plan.compute <= COMPUTE_PART * plan.budget
                if plan.fits and (small or not ffn_on_host or self._density is not None):
                    break
        assert plan is not None
        return plan

    def _fixed(
        self, memory: ContextMemory, n_gpu_layers: int, ffn_on_host: bool, n_batch: int
    ) -> GpuPlan:
        widths = [ffn.width for ffn in self._on_device(n_gpu_layers).values()]
        return GpuPlan(
            budget=self._budget.n_bytes,
            source=self._budget.source,
            device=self._device.name,
            n_gpu_layers=n_gpu_layers,
            n_layers=self._header.n_layers,
            ffn_on_host=ffn_on_host,
            levels=self._levels_of(n_gpu_layers),
            density=1.0,
            n_ctx=int(self._kwargs["n_ctx"]),
            n_batch=n_batch,
            driver=self._budget.driver,
            weights=memory.weights,
            cache=memory.cache,
            compute=memory.compute + (CUDA_RUN_BYTES if self._is_cuda else 0),
            statistics=0 if self._dense else self._rounded(16 * sum(widths) + 1024 * len(widths)),
            core=0,
        )

    def _with_density(self, plan: GpuPlan) -> GpuPlan:
        """The plan with the density wanted, or the most that there is room for."""
        if self._chooser is None or (self._density is None and not plan.ffn_on_host):
            return plan
        if isinstance(self._density, int | float):
            core = self._core_bytes(self._density, plan)
            return dataclasses.replace(plan, density=float(self._density), core=core)
        found = plan
        least = LEAST_DENSITY if plan.levels == ("full",) else LEAST_WITH_LEVELS
        for hundredths in range(100, round(100 * least) - 1, -1):
            try:
                core = self._core_bytes(hundredths / 100, plan)
            except ArgumentError:  # layers= does not leave it possible
                continue
            found = dataclasses.replace(plan, density=hundredths / 100, core=core)
            if found.fits:
                break
        return found

    def _on_device(self, n_gpu_layers: int) -> dict[int, Any]:
        first = self._header.n_layers + 1 - n_gpu_layers
        return {layer: ffn for layer, ffn in self._ffn.items() if layer >= first}

    def _ffns(self, n_gpu_layers: int) -> list[Ffn]:
        """The FFNs with the levels that their neurons have where they are computed."""
        on_device = self._on_device(n_gpu_layers)
        return [
            Ffn(
                layer,
                ffn.width,
                ffn.n_bytes,
                ffn.device_neuron_bytes if layer in on_device else ffn.neuron_bytes,
            )
            for layer, ffn in self._ffn.items()
        ]

    def _levels_of(self, n_gpu_layers: int) -> tuple[Level, ...]:
        if self._levels is not None:
            return tuple(self._levels)
        if len(self._on_device(n_gpu_layers)) < len(self._ffn):
            return ("full",)  # what neurons can have differs from layer to layer
        return settled_levels(None, self._ffns(n_gpu_layers))

    def _core_bytes(self, density: float, plan: GpuPlan) -> int:
        """What the core sets on the device take."""
        assert self._chooser is not None
        on_device = self._on_device(plan.n_gpu_layers)
        densities = list(self._chooser.densities(density))
        rounding = 0
        if plan.levels == ("full",):
            widths = [ffn.width for ffn in self._ffn.values()]
            counts = n_kept(widths, densities)
            of_each = [f.core_bytes(n) for f, n in zip(self._ffn.values(), counts, strict=True)]
        else:
            if self._shares_bytes and len(on_device) < len(self._ffn):
                densities = [1.0] * len(self._ffn)  # any layer may have most of the bytes
            block = constants().device_block
            of_each = [
                ffn.level_bytes(of_layer, block if ffn.width % block else 0)
                for ffn, of_layer in zip(self._ffn.values(), densities, strict=True)
            ]
            # a layer makes good what rounding to blocks did to those before it
            rounding = max(block * ffn.n_bytes // ffn.width for ffn in self._ffn.values())
        return rounding + sum(
            self._rounded(n)
            for n, layer in zip(of_each, self._ffn, strict=True)
            if layer in on_device
        )

    def _rounded(self, n_bytes: int) -> int:
        """The memory that a buffer takes."""
        unit = CUDA_GRANULARITY if self._is_cuda else 1
        return -(-n_bytes // unit) * unit

    def _measured(self, llama: CheckedLlama, n_batch: int) -> ContextMemory:
        """What a context takes of the GPU that evaluates so many tokens at once."""
        with trial_context(llama, n_batch) as context:
            # its statistics need nodes of the graph
            core = None if self._dense else CoreContext(context, self._header.files, 1)
            try:
                return context_memory(context, _FIRST)
            finally:
                if core is not None:
                    core.close()

    def _refusal(self, plan: GpuPlan) -> str:
        parts = {
            "CUDA": plan.driver,
            "weights": plan.weights,
            f"cache of {plan.n_ctx} tokens": plan.cache,
            "computing": plan.compute + plan.statistics,
            f"core set of density {plan.density:g}": plan.core,
        }
        figures = ", ".join(f"{name} {mebibytes(size)}" for name, size in parts.items() if size)
        return (
            f"{self._header.path} does not fit into {mebibytes(plan.budget)} of {plan.device}"
            f" ({plan.source}): all layers need {mebibytes(plan.total)} ({figures}), and not even"
            f" one fits. What would fit: gpu_memory of {mebibytes(plan.total)}, or a smaller n_ctx"
        )
