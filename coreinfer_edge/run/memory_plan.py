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
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from coreinfer_edge.binding.core import ContextMemory, constants, context_memory, loading
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.binding.placement import Placement
from coreinfer_edge.choose.chooser import Chooser, n_kept
from coreinfer_edge.choose.prior import Prior
from coreinfer_edge.choose.statistics import Ffn, Level
from coreinfer_edge.errors import (
    ArgumentError,
    InsufficientMemoryError,
    MemoryBudgetError,
    UnsupportedModelError,
)
from coreinfer_edge.model.chat_templates import CheckedLlama
from coreinfer_edge.model.ffn import dense_ffn, why_not_dense
from coreinfer_edge.model.header import GGUFHeader
from coreinfer_edge.run.absent_model import AbsentModel
from coreinfer_edge.run.exact import MOST_DRAFTS
from coreinfer_edge.run.options import DRAFT_DENSITY
from coreinfer_edge.run.process_memory import available_bytes, private_bytes, release_free_memory
from coreinfer_edge.run.processors import allowed_processors
from coreinfer_edge.run.session import AUTO_TOKENS

# Left to the system of what is available ("auto"): other programs, and the page cache, want some.
AUTO_MARGIN = 0.1
AUTO_MARGIN_LEAST = 64 << 20

# Part of the budget that the plan leaves free: page tables, the heap between its pieces.
RESERVE = 0.03

# Tokens that a graph evaluates at once, the most first, if the user does not say.
BATCHES = (2048, 1024, 512, 256, 128, 64, 32)
DEFAULT_BATCH = 512
# Without a density to keep to, its buffers may have this part of the budget.
COMPUTE_PART = 0.1

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

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS.update({f"{unit}i": 1024 ** (i + 1) for i, unit in enumerate("kmgt")})


def least_ahead() -> int:
    """The bytes that streaming takes to read ahead, at least."""
    return constants().stream_min_chunks * (constants().stream_chunk + CHUNK_MARGIN)


def parse_size(size: int | str, argument: str = "memory") -> int:
    """A number of bytes: an int, or text like ``"1.5GiB"``, ``"800MB"``, ``"800M"``.

    Raises:
        ArgumentError: it is none.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt]i?)?b?)", size.strip().lower())
        n_bytes = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    else:
        n_bytes = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if n_bytes <= 0:
        raise ArgumentError(
            f"{argument} is {size!r}: it must be a size like '1.5GiB' or '800MB', a number of"
            " bytes, or 'auto'"
        )
    return n_bytes


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


def planning_chooser(
    header: GGUFHeader, strategy: str, layers: Mapping[int, float] | None, prior: Prior | None
) -> Chooser:
    """What shares a density out over the layers, of a model that is not loaded."""
    ffn = dense_ffn(header)
    ffns = [Ffn(layer, of_layer.width, 0) for layer, of_layer in ffn.items()]
    n_layers = max(header.n_layers, max(ffn) + 1)
    return Chooser(strategy, ffns, n_layers, [], prior, layers)


def wants_all_logits(llama_kwargs: Mapping[str, Any]) -> bool:
    """Whether arguments of ``Llama`` ask for the logits of each token."""
    return any(llama_kwargs.get(name) for name in ("logits_all", "embedding", "draft_model"))


def batches(llama_kwargs: Mapping[str, Any], most: int) -> list[int]:
    """Tokens to evaluate at once that a plan tries, the most first; the one given, if any."""
    n_ctx = int(llama_kwargs["n_ctx"])
    if given := llama_kwargs.get("n_ubatch") or llama_kwargs.get("n_batch"):
        return [min(given, n_ctx)]
    return [n for n in BATCHES if n <= min(most, max(BATCHES[-1], n_ctx))]


@contextmanager
def trial_context(llama: CheckedLlama, n_batch: int) -> Iterator[int]:
    """A ``llama_context *`` that evaluates so many tokens at once, beside the model's own."""
    params = type(llama.context_params).from_buffer_copy(llama.context_params)
    params.n_batch = params.n_ubatch = n_batch
    params.n_seq_max = min(params.n_seq_max, n_batch)  # more would be an assertion
    with loading(llama.packed, llama.tied):  # without data llama.cpp asks where weights may go
        context = llama_cpp.llama_init_from_model(llama.model, params)
    if not context:
        raise InsufficientMemoryError(
            f"llama.cpp makes no context of {params.n_ctx} tokens: give a smaller n_ctx"
        )
    try:
        yield context
    finally:
        llama_cpp.llama_free(context)


def embedding_rows_bytes(header: GGUFHeader, n_batch: int, adapted: bool) -> int:
    """The rows of an embedding in the file that are held, each in pages of its own.

    0 for one that a LoRA adapter has in memory.
    """
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or adapted:
        return 0
    row = embedding.n_bytes * embedding.shape[0] // max(1, embedding.n_elements)
    return min(embedding.n_bytes, max(constants().lookup_rows, n_batch) * (row + PAGE))


class Planner:
    """Plans one model.

    Args:
        header: of the model.
        memory: the budget: a size, or ``"auto"``.
        density: what the user wants, None for as much as fits.
        strategy: how the core set is chosen; ``"dense"`` for none.
        layers: densities of some layers by number.
        prior: statistics from calibration, if the model has them.
        llama_kwargs: arguments of ``llama_cpp.Llama``, ``model_path`` and ``n_ctx`` among them.
        levels: the levels that neurons can have.
        set_once: whether these are set when the model is loaded; None for what is better, by
            ONCE_DENSITY.
        exact: whether the core set drafts, and dense passes verify.

    Raises:
        ArgumentError: an argument does not go with a budget.
        MemoryBudgetError: it does not fit; says what would.
    """

    def __init__(
        self,
        header: GGUFHeader,
        memory: int | str,
        density: float | Literal["auto"] | None,
        strategy: str,
        layers: Mapping[int, float] | None,
        prior: Prior | None,
        llama_kwargs: Mapping[str, Any],
        levels: Sequence[Level] = ("full",),
        set_once: bool | None = False,
        exact: bool = False,
    ) -> None:
        for name in ("n_gpu_layers", "use_mlock"):
            if llama_kwargs.get(name):
                raise ArgumentError(f"{name} does not go with memory, which plans for the CPU")
        release_free_memory()  # of models that are closed: their memory would count as used
        self._budget, self._source = budget_bytes(memory)
        self._header = header
        self._density = density if density in (None, "auto") else float(density)
        self._dense = strategy == "dense"
        self._levels = tuple(levels)
        self._set_once = set_once
        self._statistics_bytes = STATISTICS_BYTES + (PRIOR_BYTES if prior is not None else 0)
        self._exact = exact and not self._dense
        self._kwargs = {k: v for k, v in llama_kwargs.items() if k not in ("lora_path", "memory")}
        self._adapted = bool(llama_kwargs.get("lora_path"))
        self._n_ctx = int(llama_kwargs["n_ctx"])
        self._threads = int(llama_kwargs.get("n_threads_batch") or allowed_processors())
        self._ffn = dense_ffn(header)
        if not self._ffn and not self._dense:
            if density is not None:
                raise UnsupportedModelError(
                    f"no layer has a dense FFN that a core set can stand for"
                    f" ({why_not_dense(header)})"
                )
            self._dense = True
        self._widths = [layer.width for layer in self._ffn.values()]
        self._densities: Callable[[float], Any] = lambda density: [density] * len(self._ffn)
        if not self._dense:
            self._densities = planning_chooser(header, strategy, layers, prior).densities
        # those that layers= leaves possible, the most first
        hundredths = range(100, round(100 * LEAST_DENSITY) - 1, -1)
        possible = [n / 100 for n in hundredths if self._is_possible(n / 100)]
        self._possible = possible or [DEFAULT_DENSITY]
        self._adapter_bytes = (
            os.path.getsize(lora) if (lora := llama_kwargs.get("lora_path")) else 0
        )
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
        if wants_all_logits(self._kwargs):
            n_outputs = 0  # llama.cpp's own: all
        else:
            n_outputs = AUTO_TOKENS if self._density == "auto" else 1
            if self._exact:
                n_outputs = self._most_verified()
        return Placement(streamed, n_outputs, self._adapted, read_ahead, without_data)

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
            for n_batch in batches(self._kwargs, DEFAULT_BATCH):
                plan = self._plan(unloaded, n_batch, False, most)
                if plan.fits:
                    break
        return plan

    def _streamed_plans(self) -> list[MemoryPlan]:
        """With the FFN weights in the file, for each number of tokens at once, the most first."""
        plans = []
        with self._unloaded(True) as unloaded:
            for n_batch in batches(self._kwargs, BATCHES[0]):
                plan = self._plan(unloaded, n_batch, True, self._possible[-1])
                plans.append(self._with_density(plan))
        return plans

    def _plan_once(self) -> MemoryPlan:
        """With levels set once: the most tokens at once that leave room."""
        with self._unloaded(True) as unloaded:
            for n_batch in batches(self._kwargs, DEFAULT_BATCH):
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
            embedding=embedding_rows_bytes(self._header, n_batch, self._adapted) if streamed else 0,
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
                streamed = Planner(
                    self._header, self._budget, None, "energy", None, None, self._kwargs
                ).plan()
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


def mebibytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
