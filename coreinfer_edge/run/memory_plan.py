"""Plans what a model takes of a memory budget, before it is loaded.

If the model and its core set fit, it is loaded as ever. If not, its embedding and the weights of
its FFNs stay in the file. Of the embedding the rows in use are in memory; the FFNs pre-fill reads
layer by layer, and decoding has the core set alone. Both are never in memory at once, so the larger
of the two counts; exact decoding goes to and fro between them, and their sum does. Or the levels of
the neurons are set once, when the model is loaded: prompts and answers run on them, and nothing is
read from the file later.
"""

from __future__ import annotations

import bisect
import dataclasses
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from coreinfer_edge.binding.core import ContextMemory, constants, context_memory
from coreinfer_edge.binding.placement import Placement
from coreinfer_edge.choose.chooser import n_kept
from coreinfer_edge.choose.statistics import Level
from coreinfer_edge.errors import (
    ArgumentError,
    MemoryBudgetError,
)
from coreinfer_edge.model.chat_templates import CheckedLlama
from coreinfer_edge.model.ffn import dense_ffn
from coreinfer_edge.model.header import GGUFHeader
from coreinfer_edge.run.absent_model import AbsentModel
from coreinfer_edge.run.exact import MOST_DRAFTS
from coreinfer_edge.run.options import DRAFT_DENSITY
from coreinfer_edge.run.planning import (
    AUTO_MARGIN,
    BATCHES,
    COMPUTE_PART,
    DEFAULT_BATCH,
    PlanRequest,
    mebibytes,
    parse_size,
    trial_context,
)
from coreinfer_edge.run.process_memory import available_bytes, private_bytes, release_free_memory
from coreinfer_edge.run.processors import allowed_processors

# Left to the system of what is available ("auto"), at least.
AUTO_MARGIN_LEAST = 64 << 20

# Part of the budget that the plan leaves free: page tables, the heap between its pieces.
RESERVE = 0.03

LEAST_DENSITY = 0.05

# With less of the bytes each prompt chooses its own levels, if the user leaves that open. Levels
# set once cost more, mainly because the prompt runs on them too: from here on about the 0.1 that a
# density "auto" keeps to (docs/memory.md).
ONCE_DENSITY = 0.8

# Logits of the tokens that a pass verifies may have this part of the budget.
LOGITS_PART = 0.02

# Added to the memory that a refusal names, so that it is enough.
PLAN_MARGIN = 8 << 20
DEFAULT_DENSITY = 0.5

# Beside a chunk that is read ahead: it is of whole groups of rows and of whole pages.
CHUNK_MARGIN = 64 << 10
PAGE = mmap.PAGESIZE

# Measured: the sums of an FFN neuron in the library, and in Python those of this prompt, the last
# and the next; what a sampler keeps for each token of the vocabulary; a thread's part in gathering.
STATISTICS_BYTES = 100
PRIOR_BYTES = 80  # of a neuron, where statistics of a prompt are combined with a prior
SAMPLING_BYTES = 60
THREAD_BYTES = 1 << 20


def least_ahead() -> int:
    """The bytes that streaming takes to read ahead, at least."""
    return constants().stream_min_chunks * (constants().stream_chunk + CHUNK_MARGIN)


def budget_bytes(memory: int | str) -> tuple[int, str]:
    """The budget that ``memory`` stands for, and where it comes from.

    ``"auto"`` is what this process has and what it can still get, less AUTO_MARGIN of that.
    """
    if memory != "auto":
        return parse_size(memory), "memory"
    available, source = available_bytes()
    margin = max(AUTO_MARGIN_LEAST, int(AUTO_MARGIN * available))
    return (private_bytes() or 0) + max(0, available - margin), source


@dataclass(frozen=True)
class MemoryPlan:
    """What a model will take, in bytes of private memory.

    Attributes:
        budget: what it may take.
        source: what sets the budget: the argument, the machine, or a control group.
        streamed: the FFN weights stay in the file, and pre-fill reads them layer by layer.
        set_once: the levels of the neurons are set when the model is loaded. Prompts and answers
            run on them; the FFN weights stay in the file, and nothing reads them later.
        levels: the levels that neurons can have.
        density: fraction of FFN neurons to keep, or with levels of the bytes of their weights; with
            ``"auto"`` the most there is room for.
        n_ctx: context in tokens.
        n_batch: tokens that a graph evaluates at once.
        read_ahead: bytes of FFN weights to read ahead.
        base: Python, libraries, vocabulary, and what else this process has already.
        weights: all that are held: without FFNs and embedding, if they are streamed.
        embedding: its rows that are held, if they are looked up in the file.
        cache: keys and values.
        compute: buffers of the largest graph, and of sampling.
        statistics: of the activations.
        streaming: the FFN weights that are in memory during pre-fill.
        core: the core set, and gathering it.
        exact: the core set and streaming are in memory at once.
    """

    budget: int
    source: str
    streamed: bool
    set_once: bool
    levels: tuple[Level, ...]
    density: float
    n_ctx: int
    n_batch: int
    read_ahead: int
    base: int
    weights: int
    embedding: int
    cache: int
    compute: int
    statistics: int
    streaming: int
    core: int
    exact: bool = False

    @property
    def total(self) -> int:
        """The most there will be at once."""
        both = self.streaming + self.core if self.exact else max(self.streaming, self.core)
        return self._fixed + both

    @property
    def _fixed(self) -> int:
        parts = (self.base, self.weights, self.embedding, self.cache, self.compute, self.statistics)
        return sum(parts)

    @property
    def whole(self) -> bool:
        """Whether all weights are in memory."""
        return not self.streamed and not self.set_once

    @property
    def fits(self) -> bool:
        return self.total <= self.usable

    @property
    def memory_budget(self) -> int:
        """What main memory may be taken."""
        return self.budget

    @property
    def usable(self) -> int:
        """The budget less what is kept free."""
        return int(self.budget * (1 - RESERVE))

    @property
    def room(self) -> int:
        """What is left for streaming, and for the core set."""
        return self.usable - self._fixed

    def as_dict(self) -> dict[str, Any]:
        """The plan in types that JSON has."""
        return {**dataclasses.asdict(self), "total": self.total, "fits": self.fits}


def embedding_rows_bytes(header: GGUFHeader, n_batch: int, adapted: bool) -> int:
    """The rows of an embedding in the file that are held, each in pages of its own.

    0 for one that a LoRA adapter has in memory.
    """
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or adapted:
        return 0
    row = embedding.n_bytes * embedding.shape[0] // max(1, embedding.n_elements)
    return min(embedding.n_bytes, max(constants().lookup_rows, n_batch) * (row + PAGE))


class MemoryPlanner:
    """Plans one model.

    Args:
        request: the model, and how it is to run, with levels.
        memory: the budget: a size, or ``"auto"``.
        set_once: whether levels are set when the model is loaded; None for what is better, by
            ONCE_DENSITY.

    Raises:
        ArgumentError: an argument does not go with a budget.
        UnsupportedModelError: the model has no dense FFN.
    """

    def __init__(
        self, request: PlanRequest, memory: int | str, set_once: bool | None = False
    ) -> None:
        given = request.llama_kwargs
        for name in ("n_gpu_layers", "use_mlock"):
            if given.get(name):
                raise ArgumentError(f"{name} does not go with memory, which plans for the CPU")
        release_free_memory()  # of models that are closed: their memory would count as used
        self._budget, self._source = budget_bytes(memory)
        self._request = request
        self._header = request.header
        self._density = request.density
        self._dense = request.is_dense
        assert request.levels is not None
        self._levels: tuple[Level, ...] = tuple(request.levels)
        self._set_once = set_once
        self._statistics_bytes = STATISTICS_BYTES + (PRIOR_BYTES if request.prior else 0)
        self._exact = request.exact and not self._dense
        self._kwargs = {k: v for k, v in given.items() if k not in ("lora_path", "memory")}
        self._n_ctx = int(given["n_ctx"])
        self._threads = int(given.get("n_threads_batch") or allowed_processors())
        self._ffn = dense_ffn(self._header)
        self._widths = [layer.width for layer in self._ffn.values()]
        self._densities: Callable[[float], Any] = lambda density: [density] * len(self._ffn)
        if not self._dense:
            self._densities = request.chooser().densities
        # those that layers= leaves possible, the most first
        hundredths = range(100, round(100 * LEAST_DENSITY) - 1, -1)
        possible = [n / 100 for n in hundredths if self._is_possible(n / 100)]
        self._possible = possible or [DEFAULT_DENSITY]
        self._adapter_bytes = os.path.getsize(given["lora_path"]) if request.is_adapted else 0
        self._largest_layer = max((ffn.weight_bytes for ffn in self._ffn.values()), default=0)

    def _is_possible(self, density: float) -> bool:
        try:
            self._densities(density)
        except ArgumentError:
            return False
        return True

    @property
    def is_dense(self) -> bool:
        """Whether the plan is for a model without core sets."""
        return self._dense

    @property
    def packed(self) -> bool:
        """Whether the plan is for weights in the layout of our own kernels."""
        return bool(self._kwargs.get("packed"))

    def placement(self, plan: MemoryPlan, *, without_data: bool = False) -> Placement:
        return self._placement(not plan.whole, plan.read_ahead, without_data)

    def _placement(
        self, streamed: bool, read_ahead: int = 0, without_data: bool = True
    ) -> Placement:
        n_outputs = self._request.n_outputs
        if self._exact and n_outputs:
            n_outputs = self._most_verified()
        adapted = self._request.is_adapted
        return Placement(streamed, n_outputs, adapted, read_ahead, without_data)

    def _unloaded(self, streamed: bool) -> _Unloaded | AbsentModel:
        if not self._header.files:
            return AbsentModel(self._header, streamed, self._kwargs)
        return _Unloaded(self._header, self._placement(streamed), self._kwargs)

    def _most_verified(self) -> int:
        """The tokens of a pass: fewer where their logits would take much of the budget."""
        embedding = self._header.tensors.get("token_embd.weight")
        n_vocab = embedding.shape[1] if embedding else 0
        most = 1 + MOST_DRAFTS
        return most if most * 4 * n_vocab <= LOGITS_PART * self._budget else most // 2

    def plan(self) -> MemoryPlan:
        """The plan to go by."""
        is_asked = self._set_once and isinstance(self._density, float)
        whole = None if is_asked else self._whole()
        if whole is not None and whole.fits:
            return whole
        if self._dense:
            assert whole is not None
            raise MemoryBudgetError(self._refusal(whole))
        once = None if self._set_once is False else self._plan_once()
        if once is not None and (self._set_once or once.density >= ONCE_DENSITY):
            if once.fits:
                return once
            if self._set_once:
                raise MemoryBudgetError(self._refusal(once))
        plans = self._streamed_plans()
        for plan in plans:
            if plan.fits and (self._density is not None or self._may_take(plan.compute)):
                return plan
        fitting = [plan for plan in plans if plan.fits]
        if fitting:
            return fitting[-1]
        raise MemoryBudgetError(self._refusal(plans[-1]))

    def _may_take(self, compute: int) -> bool:
        return compute <= COMPUTE_PART * self._budget

    def _whole(self) -> MemoryPlan | None:
        """With all weights in memory; None if that is out of the question."""
        weights = sum(tensor.n_bytes for tensor in self._header.tensors.values())
        if not self._dense and weights > self._budget:
            return None
        most = self._density if isinstance(self._density, float) else 1.0
        if self._exact and self._density is None:
            most = DRAFT_DENSITY
        plan = None
        with self._unloaded(False) as unloaded:
            for n_batch in self._request.batches(DEFAULT_BATCH):
                plan = self._plan(unloaded, n_batch, False, most)
                if plan.fits:
                    break
        return plan

    def _streamed_plans(self) -> list[MemoryPlan]:
        """With the FFN weights in the file, for each number of tokens at once, the most first."""
        plans = []
        with self._unloaded(True) as unloaded:
            for n_batch in self._request.batches(BATCHES[0]):
                plan = self._plan(unloaded, n_batch, True, self._possible[-1])
                plans.append(self._with_density(plan))
        return plans

    def _plan_once(self) -> MemoryPlan:
        """With levels set once: the most tokens at once that leave room."""
        with self._unloaded(True) as unloaded:
            for n_batch in self._request.batches(DEFAULT_BATCH):
                plan = self._plan(unloaded, n_batch, True, self._possible[-1])
                plan = dataclasses.replace(
                    plan,
                    streamed=False,
                    set_once=True,
                    read_ahead=0,
                    streaming=0,
                    statistics=STATISTICS_BYTES * sum(self._widths),
                )
                density = self._density_for(plan)
                core = self._core_bytes(density)
                plan = dataclasses.replace(plan, density=density, core=core)
                if plan.fits and (self._density is not None or self._may_take(plan.compute)):
                    break
        return plan

    def _plan(
        self, unloaded: _Unloaded | AbsentModel, n_batch: int, streamed: bool, density: float
    ) -> MemoryPlan:
        memory = unloaded.memory(n_batch)
        width = max([*self._widths, self._embedding_width()])
        n_outputs = self._placement(streamed).n_outputs or n_batch
        vocabulary = unloaded.n_vocab
        # without a density the model is dense if it fits
        no_core = self._dense or (self._density is None and not streamed and not self._exact)
        # drafts have buffers of their own
        compute = memory.compute + (unloaded.memory(1).compute if self._exact else 0)
        return MemoryPlan(
            budget=self._budget,
            source=self._source,
            streamed=streamed,
            set_once=False,
            levels=self._levels,
            density=density,
            n_ctx=self._n_ctx,
            n_batch=n_batch,
            read_ahead=least_ahead() if streamed else 0,
            base=unloaded.base,
            weights=memory.weights + self._adapter_bytes,
            cache=memory.cache,
            # llama.cpp does not count the copy that a product makes of its quantised input
            compute=compute + 2 * n_batch * width + vocabulary * (4 * n_outputs + SAMPLING_BYTES),
            embedding=embedding_rows_bytes(self._header, n_batch, self._request.is_adapted)
            if streamed
            else 0,
            statistics=0 if no_core else self._statistics_bytes * sum(self._widths),
            streaming=self._largest_layer + least_ahead() if streamed else 0,
            core=0 if no_core else self._core_bytes(density),
            exact=self._exact and streamed,
        )

    def _density_for(self, plan: MemoryPlan) -> float:
        """The density wanted, or the most that the plan has room for."""
        if isinstance(self._density, float):
            return self._density
        both = self._exact and plan.streamed
        room = plan.room - (self._largest_layer + least_ahead() if both else 0)
        if self._core_bytes(self._possible[0]) <= room:  # whole layers can take less than gathered
            return self._possible[0]
        # they are in descending order, and so are their bytes
        first = bisect.bisect_left(self._possible, -room, key=lambda x: -self._core_bytes(x))
        return self._possible[min(first, len(self._possible) - 1)]

    def _with_density(self, plan: MemoryPlan) -> MemoryPlan:
        """The streamed plan with the density wanted, or the most that there is room for."""
        density = self._density_for(plan)
        core = self._core_bytes(density)
        # what the core set takes is free during pre-fill; two layers ahead are enough
        room = plan.room - core if self._exact else max(plan.room, core)
        ahead = room - self._largest_layer
        ahead = max(least_ahead(), min(ahead, 2 * self._largest_layer))
        streaming = self._largest_layer + ahead
        return dataclasses.replace(
            plan, density=density, core=core, read_ahead=ahead, streaming=streaming
        )

    def _core_bytes(self, density: float) -> int:
        """The core set, and what gathering takes besides."""
        layers, densities = self._ffn.values(), self._densities(density)
        if self._levels == ("full",):
            counts = n_kept(self._widths, densities)
            core = sum(layer.core_bytes(kept) for layer, kept in zip(layers, counts, strict=True))
        else:
            core = sum(
                layer.level_bytes(of_layer)
                for layer, of_layer in zip(layers, densities, strict=True)
            )
        # a chunk of the file, a row as floats, and rows on their way into a layout
        return core + self._threads * (THREAD_BYTES + 8 * max(self._widths))

    def _embedding_width(self) -> int:
        value = self._header.of_architecture("embedding_length")
        return value if isinstance(value, int) else 0

    # --- refusing ---

    def _refusal(self, plan: MemoryPlan) -> str:
        parts = {
            "Python and vocabulary": plan.base,
            "weights": plan.weights + plan.embedding,
            f"cache of {plan.n_ctx} tokens": plan.cache,
            "computing": plan.compute + plan.statistics,
        }
        if plan.streaming:
            parts["reading FFN weights"] = plan.streaming
        if plan.core:
            parts[f"core set of density {plan.density:g}"] = plan.core
        # what Python takes differs a little from one start to the next
        needed = int(plan.total / (1 - RESERVE)) + PLAN_MARGIN
        parts["kept free"] = needed - plan.total
        figures = ", ".join(f"{name} {mebibytes(size)}" for name, size in parts.items())
        return (
            f"{self._header.path} does not fit into {mebibytes(self._budget)} ({self._source}):"
            f" it needs {mebibytes(needed)} ({figures}). What would fit:"
            f" {'; '.join([*self._what_fits(plan), f'memory of {mebibytes(needed)}'])}"
        )

    def _what_fits(self, plan: MemoryPlan) -> list[str]:
        fits = []
        if not plan.whole and isinstance(self._density, float):
            lower = (x for x in self._possible if x < float(self._density))
            if most := next((x for x in lower if self._with(plan, x).fits), None):
                fits.append(f"density={most:g}")
        elif plan.whole and self._ffn and plan.total - plan.weights < plan.usable:
            try:
                request = PlanRequest(
                    header=self._header, llama_kwargs=self._kwargs, levels=("full",)
                )
                streamed = MemoryPlanner(request, self._budget).plan()
                fits.append(f"strategy='energy' and density={streamed.density:g}")
            except MemoryBudgetError:
                pass
        spare = plan.usable - (plan.total - plan.cache)
        per_token = plan.cache / plan.n_ctx
        n_ctx = int(spare / per_token) // 256 * 256 if per_token else 0
        if 0 < n_ctx < plan.n_ctx:
            fits.append(f"n_ctx={n_ctx}")
        if plan.cache * 0.54 <= spare and not self._kwargs.get("type_k"):
            fits.append("type_k=8, type_v=8 (Q8_0) with flash_attn=True")
        return fits

    def _with(self, plan: MemoryPlan, density: float) -> MemoryPlan:
        streaming = self._largest_layer + least_ahead() if plan.streamed else 0
        core = self._core_bytes(density)
        return dataclasses.replace(plan, density=density, core=core, streaming=streaming)


class _Unloaded:
    """The model as it would be loaded, without the weights: says what it would take."""

    def __init__(
        self, header: GGUFHeader, placement: Placement, llama_kwargs: Mapping[str, Any]
    ) -> None:
        arguments = {**llama_kwargs, **placement.llama_arguments(header.files), "verbose": False}
        self._llama = CheckedLlama(**arguments)
        self.n_vocab = int(self._llama.n_vocab())
        release_free_memory()  # of the contexts tried so far
        self.base = private_bytes() or 0

    def memory(self, n_batch: int) -> ContextMemory:
        """What a context takes that evaluates so many tokens at once."""
        with trial_context(self._llama, n_batch) as context:
            return context_memory(context)

    def __enter__(self) -> _Unloaded:
        return self

    def __exit__(self, *exception: object) -> None:
        self._llama.close()
