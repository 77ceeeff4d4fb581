"""Plans what a model takes of the memory of GPUs, before it is loaded.

If the model fits, all of it goes to the GPUs. If not, the weights of its FFNs stay in main memory:
pre-fill sends them across the bus, and decoding has the core set on the GPUs, with everything else.
If even that does not fit, the first layers are the processor's. With a budget for main memory too,
FFN weights that do not fit there stay in the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import closing

from coreinfer_edge.binding.core import (
    ContextMemory,
    CoreContext,
    constants,
    context_memory,
    devices,
)
from coreinfer_edge.binding.cuda import spare_stacks
from coreinfer_edge.binding.load import GPUS_OF_OTHERS
from coreinfer_edge.binding.placement import DevicePlacement, FfnPlace
from coreinfer_edge.choose.chooser import Chooser, n_kept, settled_levels
from coreinfer_edge.choose.statistics import Ffn, Level
from coreinfer_edge.errors import (
    ArgumentError,
    MemoryBudgetError,
)
from coreinfer_edge.model.chat_templates import CheckedLlama
from coreinfer_edge.model.ffn import LayerFFN, dense_ffn
from coreinfer_edge.run.gpu_budget import (
    CUDA_BYTES,
    CUDA_GRANULARITY,
    CUDA_WITH_STACKS,
    budget_of,
    cuda_run_bytes,
    parse_budgets,
)
from coreinfer_edge.run.gpu_host_plan import HostPlanner
from coreinfer_edge.run.gpu_plan import DevicePlan, GpuPlan
from coreinfer_edge.run.planning import (
    BATCHES,
    COMPUTE_PART,
    DEFAULT_BATCH,
    PlanRequest,
    mebibytes,
    trial_context,
)

# The least that a plan chooses by itself: below, text is another. With less room the GPU has fewer
# layers. With levels a lower density does as little damage (docs/quality.md).
LEAST_DENSITY = 0.7
LEAST_WITH_LEVELS = 0.55

# How often layers are shared out anew after measuring.
SHARINGS = 6


class GpuPlanner:
    """Plans one model on the GPUs that there are.

    Args:
        request: the model, and how it is to run. Without levels it has all that there are where
            GPUs compute all layers, and keeping or dropping elsewhere.
        gpu_memory: the budgets, as ``parse_budgets`` has them.
        memory: the budget of main memory, a size or ``"auto"``; None for none.

    Raises:
        ArgumentError: there is no GPU, there are more budgets than GPUs, or the neurons cannot have
            the levels.
        UnsupportedModelError: the model has no dense FFN.
    """

    def __init__(
        self,
        request: PlanRequest,
        gpu_memory: int | str | Sequence[int | str],
        memory: int | str | None = None,
    ) -> None:
        found, cuda = devices(), CUDA_BYTES
        if any(device.is_cuda for device in found):
            if not spare_stacks(GPUS_OF_OTHERS):
                cuda = CUDA_WITH_STACKS
            found = devices()  # with more free
        sizes = parse_budgets(gpu_memory)
        if not found:
            raise ArgumentError(
                "gpu_memory needs a GPU, and this build of the package sees none: see docs/gpu.md"
            )
        if len(sizes) > len(found):
            names = ", ".join(device.name for device in found)
            raise ArgumentError(
                f"gpu_memory has {len(sizes)} sizes for {len(found)} GPUs ({names}): give one, or"
                " one for each"
            )
        if len(sizes) == 1:
            sizes = sizes * len(found)
        self._devices = found[: len(sizes)]
        self._budgets = [
            budget_of(size, device, cuda) for size, device in zip(sizes, self._devices, strict=True)
        ]
        self._kwargs = {**request.llama_kwargs, "packed": False}
        self._request = dataclasses.replace(request, llama_kwargs=self._kwargs)
        self._header = request.header
        self._density = request.density
        self._dense = request.is_dense
        self._ffn = dense_ffn(self._header)
        self._exact = request.exact and not self._dense
        self._levels = request.levels
        if self._levels is not None and not self._dense:
            settled_levels(self._levels, self._ffns(self._header.n_layers + 1))
        self._chooser: Chooser | None = None if self._dense else request.chooser()
        prior = request.prior
        self._shares_bytes = prior is not None and prior.low_bits_loss is not None
        self._host = None if memory is None else HostPlanner(self._request, memory)

    def placement(self, plan: GpuPlan) -> DevicePlacement:
        counts = [device.n_layers for device in plan.devices]
        read_ahead = plan.host.read_ahead if plan.host is not None else 0
        return self._placement(counts, plan.ffn, read_ahead)

    def _placement(
        self,
        counts: Sequence[int],
        ffn: FfnPlace,
        read_ahead: int = 0,
        without_data: bool = False,
    ) -> DevicePlacement:
        return DevicePlacement(
            tuple(counts),
            ffn,
            self._request.n_outputs,
            self._request.is_adapted,
            read_ahead,
            without_data,
            self._kwargs.get("flash_attn"),
        )

    def plan(self) -> GpuPlan:
        """The plan to go by.

        Raises:
            MemoryBudgetError: nothing fits; says what would.
        """
        n_layers = self._header.n_layers + 1
        places: list[FfnPlace] = ["device"] if self._dense else ["device", "host"]
        if self._host is not None and not self._dense:
            places.append("file")
        # one GPU alone passes nothing on to others
        uses = sorted({1, len(self._devices)})
        best: GpuPlan | None = None
        for place in places:
            for n_devices in uses:
                best = self._shared_out(n_layers, n_devices, place)
                if best.fits:
                    return best
        assert best is not None
        # as many layers as there is room for: 1 is the output alone
        fitting: GpuPlan | None = None
        for place in places[1:] or places:
            low, high = self._fewest_layers(), n_layers - 1
            while low <= high:
                n = (low + high + 1) // 2
                plan = self._shared_out(n, len(self._devices), place)
                if plan.fits:
                    fitting, low = plan, n + 1
                elif all(device.fits for device in plan.devices):
                    low = n + 1  # main memory has less to hold then
                else:
                    high = n - 1
            if fitting is not None:
                return fitting
        raise MemoryBudgetError(self._refusal(best))

    def _fewest_layers(self) -> int:
        """The fewest that a GPU may have, with the output: 2, if the levels leave the choice."""
        if self._dense or self._levels is None:
            return 2
        try:
            settled_levels(self._levels, self._ffns(1))
        except ArgumentError:  # the processor's layers cannot have them
            return self._header.n_layers + 1 - min(self._ffn)
        return 2

    def _shared_out(self, n_gpu_layers: int, n_devices: int, ffn: FfnPlace) -> GpuPlan:
        """The best plan with so many layers on the first GPUs; it may not fit."""
        if n_devices == 1:
            return self.planned([n_gpu_layers], ffn)
        counts = _proportional(n_gpu_layers, [b.n_bytes for b in self._budgets[:n_devices]])
        plan = self.planned(counts, ffn)
        over = [0] * n_devices
        for _ in range(SHARINGS):
            better = self._better_counts(plan, over)
            if plan.fits and (better is None or plan.density >= better[1]):
                break
            if better is None:
                break
            measured = self.planned(better[0], ffn)
            over = [
                o + max(0, device.total - device.budget)
                for o, device in zip(over, measured.devices, strict=True)
            ]
            if measured.fits or not plan.fits:
                plan = measured
        return plan

    def _better_counts(self, plan: GpuPlan, over: Sequence[int]) -> tuple[list[int], float] | None:
        """Layers of each GPU for the highest density that there seems to be room for.

        ``over``: bytes that GPUs took more than was thought.
        """
        first = self._header.n_layers + 1 - plan.n_gpu_layers
        cache = sum(device.cache for device in plan.devices)
        per_layer = cache // max(1, min(plan.n_gpu_layers, self._header.n_layers))
        weights = self._weights_by_layer(plan.ffn)
        room = [
            device.budget - device.driver - device.compute - o
            for device, o in zip(plan.devices, over, strict=True)
        ]
        for density in self._densities(plan):
            cores = self._core_by_layer(density, plan) if density is not None else {}
            counts, layer = [], first
            for of_device in room:
                n, used = 0, 0
                while layer <= self._header.n_layers:
                    used += weights[layer] + cores.get(layer, 0)
                    if layer < self._header.n_layers:
                        used += per_layer
                    if not self._dense and layer in self._ffn:
                        used += self._rounded(16 * self._ffn[layer].width)
                    if used > of_device:
                        break
                    n, layer = n + 1, layer + 1
                counts.append(n)
            if layer > self._header.n_layers:
                return counts, 1.0 if density is None else density
        return None

    def _has_core(self, ffn: FfnPlace) -> bool:
        """Whether there is a core set, if the FFN weights lie there."""
        return not self._dense and (self._density is not None or ffn != "device")

    def _densities(self, plan: GpuPlan) -> Iterator[float | None]:
        """The densities that a plan may have, the most first; None for no core set."""
        if self._chooser is None or not self._has_core(plan.ffn):
            yield None
        elif isinstance(self._density, int | float):
            yield float(self._density)
        else:
            least = LEAST_DENSITY if plan.levels == ("full",) else LEAST_WITH_LEVELS
            for hundredths in range(100, round(100 * least) - 1, -1):
                try:
                    self._chooser.densities(hundredths / 100)
                except ArgumentError:  # layers= does not leave it possible
                    continue
                yield hundredths / 100

    def _weights_by_layer(self, ffn: FfnPlace) -> list[int]:
        """Bytes on a GPU of each layer, and of the output."""
        sizes = [0] * (self._header.n_layers + 1)
        for name, tensor in self._header.tensors.items():
            parts = name.split(".")
            if parts[0] == "blk":
                stays = ffn != "device" and parts[2] in ("ffn_up", "ffn_gate", "ffn_down")
                if not (stays and parts[3] == "weight"):
                    sizes[int(parts[1])] += tensor.n_bytes
            elif parts[0].startswith("output") or (
                parts[0] == "token_embd" and self._header.is_tied
            ):
                sizes[-1] += tensor.n_bytes
        return sizes

    def planned(self, counts: Sequence[int], ffn: FfnPlace) -> GpuPlan:
        """The best plan with so many layers on each GPU; it may not fit."""
        plan: GpuPlan | None = None
        placement = self._placement(counts, ffn, without_data=True)
        arguments = {**self._kwargs, **placement.llama_arguments(self._header.files)}
        with closing(CheckedLlama(**{**arguments, "verbose": False})) as llama:
            base = self._host.base() if self._host is not None else 0
            most = DEFAULT_BATCH if ffn == "device" else BATCHES[0]
            for n_batch in self._request.batches(most):
                of_devices, of_host = self._measured(llama, n_batch, len(counts))
                if self._exact:  # drafts have buffers of their own
                    drafts, on_host = self._measured(llama, 1, len(counts))
                    of_devices = [
                        of._replace(compute=of.compute + of_drafts.compute)
                        for of, of_drafts in zip(of_devices, drafts, strict=True)
                    ]
                    of_host = of_host._replace(compute=of_host.compute + on_host.compute)
                plan = self._with_density(self._fixed(of_devices, counts, ffn, n_batch))
                if self._host is not None:
                    on_cpu = {
                        layer: of
                        for layer, of in self._ffn.items()
                        if layer < self._header.n_layers + 1 - sum(counts)
                    }
                    host = self._host.plan(
                        of_host,
                        base,
                        int(llama.n_vocab()),
                        n_batch,
                        plan.density if self._has_core(ffn) else None,
                        on_cpu,
                        ffn,
                        placement.n_outputs,
                    )
                    plan = dataclasses.replace(plan, host=host)
                small = all(d.compute <= COMPUTE_PART * d.budget for d in plan.devices)
                if plan.fits and (small or ffn == "device" or self._density is not None):
                    break
        assert plan is not None
        return plan

    def _fixed(
        self,
        memories: Sequence[ContextMemory],
        counts: Sequence[int],
        ffn: FfnPlace,
        n_batch: int,
    ) -> GpuPlan:
        plans = []
        cuda = cuda_run_bytes(self._header, self._kwargs)
        cuda += self._on_their_way() if ffn == "host" else 0
        layer = self._header.n_layers + 1 - sum(counts)
        for device, budget, memory, n in zip(
            self._devices, self._budgets, memories, counts, strict=False
        ):
            widths = [of.width for i, of in self._ffn.items() if layer <= i < layer + n]
            layer += n
            plans.append(
                DevicePlan(
                    name=device.name,
                    budget=budget.n_bytes,
                    source=budget.source,
                    n_layers=n,
                    driver=budget.driver,
                    weights=memory.weights,
                    cache=memory.cache,
                    compute=memory.compute + (cuda if device.is_cuda else 0),
                    statistics=0
                    if self._dense
                    else self._rounded(16 * sum(widths) + 1024 * len(widths)),
                    core=0,
                )
            )
        return GpuPlan(
            devices=tuple(plans),
            n_layers=self._header.n_layers,
            ffn=ffn,
            levels=self._levels_of(sum(counts)),
            density=1.0,
            n_ctx=int(self._kwargs["n_ctx"]),
            n_batch=n_batch,
        )

    def _on_their_way(self) -> int:
        """Bytes of weights that come from main memory while a GPU of NVIDIA's computes."""
        sizes = (tensor.n_bytes for ffn in self._ffn.values() for tensor in ffn.tensors.values())
        return self._rounded(min(constants().weights_ahead, max(sizes, default=0)))

    def _with_density(self, plan: GpuPlan) -> GpuPlan:
        """The plan with the density wanted, or the most that there is room for."""
        found = plan
        for density in self._densities(plan):
            if density is None:
                return plan
            found = self._with_core(plan, density)
            if all(device.fits for device in found.devices):
                break
        return found

    def _with_core(self, plan: GpuPlan, density: float) -> GpuPlan:
        cores = self._core_by_layer(density, plan)
        layer = self._header.n_layers + 1 - plan.n_gpu_layers
        of_devices = []
        for device in plan.devices:
            end = layer + device.n_layers
            core = sum(n_bytes for i, n_bytes in cores.items() if layer <= i < end)
            core += self._rounding(plan) if core else 0
            of_devices.append(dataclasses.replace(device, core=core))
            layer = end
        return dataclasses.replace(plan, density=density, devices=tuple(of_devices))

    def _on_device(self, n_gpu_layers: int) -> dict[int, LayerFFN]:
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

    def _core_by_layer(self, density: float, plan: GpuPlan) -> dict[int, int]:
        """What the core sets of the layers take."""
        assert self._chooser is not None
        densities = list(self._chooser.densities(density))
        ffns = self._ffn.values()
        if plan.levels == ("full",):
            counts = n_kept([ffn.width for ffn in ffns], densities)
            sizes = [ffn.core_bytes(kept) for ffn, kept in zip(ffns, counts, strict=True)]
        else:
            shared_out = len(plan.devices) > 1 or len(self._on_device(plan.n_gpu_layers)) < len(
                ffns
            )
            if self._shares_bytes and shared_out:
                densities = [1.0] * len(ffns)  # any layer may have most of the bytes
            block = constants().device_block
            sizes = [
                ffn.level_bytes(of_layer, block if ffn.width % block else 0)
                for ffn, of_layer in zip(ffns, densities, strict=True)
            ]
        return {layer: self._rounded(n) for layer, n in zip(self._ffn, sizes, strict=True)}

    def _rounding(self, plan: GpuPlan) -> int:
        """What rounding to blocks of neurons adds; a layer makes good what it did to others."""
        if plan.levels == ("full",):
            return 0
        block = constants().device_block
        return max(block * ffn.n_bytes // ffn.width for ffn in self._ffn.values())

    def _rounded(self, n_bytes: int) -> int:
        """The memory that a buffer takes."""
        unit = CUDA_GRANULARITY if any(device.is_cuda for device in self._devices) else 1
        return -(-n_bytes // unit) * unit

    def _measured(
        self, llama: CheckedLlama, n_batch: int, n_devices: int
    ) -> tuple[list[ContextMemory], ContextMemory]:
        """What a context takes of each GPU, and of main memory, that evaluates so many tokens."""
        with trial_context(llama, n_batch) as context:
            # its statistics need nodes of the graph
            core = None if self._dense else CoreContext(context, self._header.files, 1)
            try:
                of_devices = [context_memory(context, i) for i in range(n_devices)]
                return of_devices, context_memory(context)
            finally:
                if core is not None:
                    core.close()

    def _refusal(self, plan: GpuPlan) -> str:
        refused = [self._why_not(device, plan) for device in plan.devices if not device.fits]
        if plan.host is not None and not plan.host.fits:
            refused.append(plan.host.refusal())
        levels = ", or levels left out" if self._fewest_layers() > 2 else ""
        return f"{self._header.path} does not fit: {'; '.join(refused)}, or a smaller n_ctx{levels}"

    def _why_not(self, device: DevicePlan, plan: GpuPlan) -> str:
        parts = {
            "CUDA": device.driver,
            "weights": device.weights,
            f"cache of {plan.n_ctx} tokens": device.cache,
            "computing": device.compute + device.statistics,
            f"core set of density {plan.density:g}": device.core,
        }
        figures = ", ".join(f"{name} {mebibytes(size)}" for name, size in parts.items() if size)
        return (
            f"into {mebibytes(device.budget)} of {device.name} ({device.source}): its"
            f" {device.n_layers} layers need {mebibytes(device.total)} ({figures}), and no plan"
            f" with fewer fits. What would fit: gpu_memory of {mebibytes(device.total)}"
        )


def _proportional(n: int, budgets: Sequence[int]) -> list[int]:
    """Share out n layers by budget."""
    total = max(1, sum(budgets))
    ends = [round(n * sum(budgets[: i + 1]) / total) for i in range(len(budgets))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
