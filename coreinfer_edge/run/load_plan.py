"""How a model is loaded: what the user asks for, and what fits into the memory there is."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from coreinfer_edge.binding.core import add_rpc_server, has_device, unread_buffer_type
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.binding.log import captured_log
from coreinfer_edge.binding.placement import DevicePlacement, Placement
from coreinfer_edge.choose.chooser import settled_levels
from coreinfer_edge.choose.prior import Prior, from_header
from coreinfer_edge.choose.statistics import Ffn, Level
from coreinfer_edge.errors import (
    ArgumentError,
    CoreInferError,
    InsufficientMemoryError,
    MemoryBudgetError,
    ModelFileError,
    UnsupportedModelError,
)
from coreinfer_edge.model.ffn import dense_ffn
from coreinfer_edge.model.header import GGUFHeader
from coreinfer_edge.model.loadable import check_loadable
from coreinfer_edge.model.source import header_of
from coreinfer_edge.run.arguments import check_llama_arguments, default_context
from coreinfer_edge.run.exact import MOST_DRAFTS
from coreinfer_edge.run.options import DRAFT_DENSITY, Options, SettledOptions
from coreinfer_edge.run.planning import PlanRequest

if TYPE_CHECKING:
    from coreinfer_edge.run.gpu_plan import GpuPlan
    from coreinfer_edge.run.memory_plan import MemoryPlan, MemoryPlanner

# The shortest context that a plan falls back to where none was asked for.
LEAST_CONTEXT = 512

# Below this density the text of every model measured was clearly another.
POOR_DENSITY = 0.7
# As much divergence as that, with levels (docs/quality.md).
POOR_LEVELS = 0.55

# What the binding raises for arguments that it cannot use.
REFUSALS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    ctypes.ArgumentError,
    llama_cpp.llama_chat_format.LlamaChatCompletionHandlerNotFoundException,
)


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """How a model is loaded.

    Attributes:
        llama_kwargs: arguments of ``llama_cpp.Llama``.
        density: of its core sets, None for none.
        strategy: how they are chosen; ``"dense"`` for llama.cpp as it is.
        levels: that neurons can have, None for all that they can have there.
        set_once: these are set when the model is loaded.
        exact: the core set drafts, and dense passes verify.
        most_density: the largest density that there is room for.
        placement: where weights go; None for where llama.cpp puts them.
        plan: for ``memory`` or ``gpu_memory``; None without.
        warnings: what the user should know of it.
    """

    llama_kwargs: dict[str, Any]
    density: float | Literal["auto"] | None
    strategy: str
    levels: Sequence[Level] | None
    set_once: bool
    exact: bool
    most_density: float = 1.0
    placement: Placement | DevicePlacement | None = None
    plan: MemoryPlan | GpuPlan | None = None
    warnings: tuple[str, ...] = ()


def load_plan(request: PlanRequest, given: Options, options: SettledOptions) -> LoadPlan:
    """The plan to load by.

    Args:
        request: the model, and how it is to run.
        given: the options as the user gave them.
        options: the same, settled.

    Raises:
        MemoryBudgetError: it does not fit; says what would.
        ArgumentError: an argument does not go with a budget.
        UnsupportedModelError: the model has no dense FFN, and a density is asked for.
    """
    if given.gpu_memory is not None:
        return _for_gpus(request, given, options)
    if given.memory is not None:
        return _for_memory(request, given, options)
    placement = None
    on_gpu = request.llama_kwargs.get("n_gpu_layers") and has_device()
    if options.sets_once and not on_gpu and unread_buffer_type():
        # gathered from the file, they need not be in memory whole
        placement = Placement(
            streamed=True,
            n_outputs=0,
            whole_embedding=request.is_adapted,
            keeps_cache=True,
        )
    return LoadPlan(
        llama_kwargs=dict(request.llama_kwargs),
        density=request.density,
        strategy=request.strategy,
        levels=request.levels,
        set_once=options.sets_once,
        exact=request.exact,
        placement=placement,
    )


def _wanted_densities(
    request: PlanRequest, given: Options
) -> Sequence[float | Literal["auto"] | None]:
    """What to plan for in turn: where ``"auto"`` is implied, the largest that fits comes first.

    ``"auto"`` itself is planned for only where there is room beside the whole model.
    """
    return (None, "auto") if given.implies_auto else (request.density,)


def _for_gpus(request: PlanRequest, given: Options, options: SettledOptions) -> LoadPlan:
    from coreinfer_edge.run.gpu_planner import GpuPlanner

    assert given.gpu_memory is not None
    for wanted in _wanted_densities(request, given):
        planner = GpuPlanner(replace(request, density=wanted), given.gpu_memory, given.memory)
        plan = planner.plan()
        if plan.ffn_on_host:
            break
    placement = planner.placement(plan)
    exact = request.exact and plan.core > 0  # elsewhere the text is the same without
    if exact and placement.n_outputs:
        placement = replace(placement, n_outputs=1 + MOST_DRAFTS)
    density = request.density
    if plan.ffn_on_host and (density != "auto" or given.implies_auto):
        density = plan.density
    return LoadPlan(
        llama_kwargs={
            **request.llama_kwargs,
            "n_batch": plan.n_batch,
            "n_ubatch": plan.n_batch,
        },
        density=density,
        strategy=request.strategy,
        levels=plan.levels,
        set_once=options.sets_once,
        exact=exact,
        most_density=plan.density if plan.core else 0.0,
        placement=placement,
        plan=plan,
    )


def _for_memory(request: PlanRequest, given: Options, options: SettledOptions) -> LoadPlan:
    assert given.memory is not None
    n_ctx = default_context(request.header) if given.n_ctx is None else given.n_ctx
    planned_ctx = n_ctx if given.implies_auto else given.n_ctx
    request = replace(request, llama_kwargs={**request.llama_kwargs, "n_ctx": planned_ctx})
    for wanted in _wanted_densities(request, given):
        planner, plan = _planned(
            replace(request, density=wanted),
            given.memory,
            options.repack,
            _may_set_once(given, request.prior),
        )
        if not plan.whole:
            break
    density, strategy = request.density, "dense" if planner.is_dense else request.strategy
    if plan.set_once:
        options.check_once()
        density, strategy = plan.density, "static"
    elif plan.streamed and (density != "auto" or given.implies_auto):
        density = plan.density
    elif density is None and request.exact:
        density = DRAFT_DENSITY
    elif density is None:  # it fits as it is
        strategy = "dense"
    return LoadPlan(
        llama_kwargs={
            **request.llama_kwargs,
            "n_batch": plan.n_batch,
            "n_ubatch": plan.n_batch,
            "n_ctx": plan.n_ctx,
            "packed": planner.packed,
        },
        density=density,
        strategy=strategy,
        levels=plan.levels,
        set_once=plan.set_once,
        exact=request.exact,
        most_density=plan.density,
        placement=planner.placement(plan),
        plan=plan,
        warnings=tuple(_warnings(plan, request.density, n_ctx)),
    )


def plan_gpu_memory(
    path: str | os.PathLike[str],
    gpu_memory: int | str | Sequence[int | str],
    density: float | Literal["auto"] | None = None,
    strategy: str = "energy",
    n_ctx: int | None = None,
    rpc: str | Sequence[str] = (),
    levels: Sequence[Level] | None = None,
    memory: int | str | None = None,
    **llama_kwargs: Any,
) -> GpuPlan:
    """What ``EdgeLLM(path, gpu_memory=gpu_memory, ...)`` would do, without loading the model.

    Raises:
        MemoryBudgetError: it would not fit; says what would.
        CoreInferError: as EdgeLLM raises.
    """
    from coreinfer_edge.run.gpu_planner import GpuPlanner

    given = Options(density, strategy, n_ctx=n_ctx, levels=levels, gpu_memory=gpu_memory)
    options = given.settled()
    check_llama_arguments(llama_kwargs)
    add_rpc_servers(rpc)
    header = header_of(path)
    check_loadable(header)
    llama_kwargs.update(model_path=str(header.path), n_ctx=n_ctx or default_context(header))
    request = _request(header, llama_kwargs, given, options)
    with load_errors(request.header, verbose=False):
        return GpuPlanner(request, gpu_memory, memory).plan()


def plan_memory(
    path: str | os.PathLike[str],
    memory: int | str,
    density: float | Literal["auto"] | None = None,
    strategy: str | None = None,
    n_ctx: int | None = None,
    levels: Sequence[Level] | None = None,
    exact: bool = False,
    **llama_kwargs: Any,
) -> MemoryPlan:
    """What ``EdgeLLM(path, memory=memory, ...)`` would do, without loading the model.

    ``path`` may be a header without files: a model that is not there, see ``absent_model``.

    Raises:
        MemoryBudgetError: it would not fit; says what would.
        CoreInferError: as EdgeLLM raises.
    """
    given = Options(density, strategy, memory=memory, n_ctx=n_ctx, levels=levels, exact=exact)
    options = given.settled()
    check_llama_arguments(llama_kwargs)
    header = header_of(path)
    if header.files:
        check_loadable(header)
    llama_kwargs.update(model_path=str(header.path), n_ctx=n_ctx)
    request = _request(header, llama_kwargs, given, options)
    with load_errors(request.header, verbose=False):
        return _planned(request, memory, options.repack, _may_set_once(given, request.prior))[1]


def _request(
    header: GGUFHeader, llama_kwargs: dict[str, Any], given: Options, options: SettledOptions
) -> PlanRequest:
    """What a plan alone is asked: the largest density that fits, unless one is given."""
    return PlanRequest(
        header=header.without_arrays(),
        llama_kwargs=llama_kwargs,
        density=None if given.implies_auto else options.density,
        strategy=options.strategy,
        prior=from_header(header),
        levels=options.levels,
        exact=options.exact,
    )


def _levels_here(header: GGUFHeader, packed: bool) -> tuple[Level, ...]:
    """The levels that neurons have by default, if weights have our layout or not."""
    if not packed:
        return ("full",)
    ffns = [
        Ffn(layer, ffn.width, ffn.n_bytes, ffn.neuron_bytes)
        for layer, ffn in dense_ffn(header).items()
    ]
    return settled_levels(None, ffns)


def _may_set_once(given: Options, prior: Prior | None) -> bool | None:
    """Whether a plan for ``memory`` sets levels once; None if it may."""
    if prior is None or given.density == "auto" or given.exact:
        return False
    if given.strategy == "static":
        return True
    left_open = given.strategy is None and given.warmup in ("auto", 0) and given.refresh is None
    return None if left_open else False


def _planned(
    request: PlanRequest, memory: int | str, repack: bool | None, set_once: bool | None
) -> tuple[MemoryPlanner, MemoryPlan]:
    """As ``_planned_one``; with ``exact`` a whole model that is dense comes before streaming."""
    if request.density is not None:  # who gives one has the context that was asked for
        asked = request.llama_kwargs["n_ctx"] or default_context(request.header)
        request = replace(request, llama_kwargs={**request.llama_kwargs, "n_ctx": asked})
    drafting: tuple[MemoryPlanner, MemoryPlan] | None = None
    refusal: MemoryBudgetError | None = None
    try:
        drafting = _planned_one(request, memory, repack, set_once)
    except MemoryBudgetError as error:
        refusal = error
    if request.exact and (drafting is None or drafting[1].streamed):
        dense = replace(request, density=None, strategy="dense", exact=False)
        with suppress(MemoryBudgetError):
            return _planned_one(dense, memory, repack, False)
    if drafting is None:
        assert refusal is not None
        raise refusal
    return drafting


def _planned_one(
    request: PlanRequest, memory: int | str, repack: bool | None, set_once: bool | None
) -> tuple[MemoryPlanner, MemoryPlan]:
    """A plan for ``memory``; ``n_ctx`` None lets it shorten the context before it drops neurons."""
    from coreinfer_edge.run.memory_plan import MemoryPlanner

    header, packed = request.header, repack is not False
    levels = _levels_here(header, packed) if request.levels is None else request.levels
    once = False if tuple(levels) == ("full",) else set_once
    layout = {"packed": packed, "tied": header.is_tied}

    def plan(n_ctx: int) -> tuple[MemoryPlanner, MemoryPlan]:
        arguments = {**request.llama_kwargs, **layout, "n_ctx": n_ctx}
        of_context = replace(request, llama_kwargs=arguments, levels=levels)
        planner = MemoryPlanner(of_context, memory, once)
        return planner, planner.plan()

    asked = request.llama_kwargs["n_ctx"]
    lengths = [asked or default_context(header)]
    if asked is None and request.density is None:
        lengths += [max(LEAST_CONTEXT, lengths[0] >> i) for i in (1, 2, 3)]
        lengths = [n for n in dict.fromkeys(lengths) if n <= lengths[0]]
    streamed = []
    for n_ctx in lengths:
        with suppress(MemoryBudgetError):
            found = plan(n_ctx)
            if found[1].whole:
                return found
            streamed.append(found)
    good = [found for found in streamed if found[1].density >= poor_density(found[1].levels)]
    if good:
        return good[0]
    if streamed:
        return max(streamed, key=lambda found: found[1].density)
    return plan(lengths[-1])  # which says why not


def poor_density(levels: Sequence[Level]) -> float:
    """Below this density the text suffers much."""
    return POOR_DENSITY if tuple(levels) == ("full",) else POOR_LEVELS


def _warnings(
    plan: MemoryPlan, density: float | Literal["auto"] | None, n_ctx: int
) -> Iterator[str]:
    """What a plan does that the user may not expect, who wants this density and context."""
    if plan.n_ctx < n_ctx:
        yield (
            f"the context is {plan.n_ctx} tokens instead of {n_ctx}, so that"
            f" {'all' if plan.whole else 'more'} of the model fits: set n_ctx to have another"
        )
    is_poor = plan.density < poor_density(plan.levels)
    if density in (None, "auto") and not plan.whole and not plan.exact and is_poor:
        yield (
            f"this memory leaves room for density {plan.density:.2f} only, and the text will suffer"
            " much: give more memory, a smaller n_ctx, or choose a smaller model"
        )


def add_rpc_servers(addresses: str | Sequence[str]) -> None:
    for address in [addresses] if isinstance(addresses, str) else addresses:
        add_rpc_server(address)


@contextmanager
def load_errors(header: GGUFHeader, verbose: bool) -> Iterator[None]:
    """Turn what llama.cpp logs when it cannot load a model into an error of ours."""
    with captured_log(echo=verbose) as log:
        try:
            yield
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{header.path}: {error}: run it with strategy='dense'"
            ) from error
        except MemoryBudgetError:
            raise
        except MemoryError as error:
            raise InsufficientMemoryError(_no_memory(header, str(error))) from error
        except CoreInferError:
            raise
        except (*REFUSALS, RuntimeError) as error:
            lines = [line.strip() for line in log if line.strip()]
            reasons = [line for line in lines if re.search("error|fail|unable|require", line)]
            reason = "; ".join(dict.fromkeys(reasons)) or str(error)
            if re.search("allocat|out of memory", reason):
                raise InsufficientMemoryError(_no_memory(header, reason)) from error
            if re.search("load.* model|vocab|LoRA", str(error)):
                raise ModelFileError(f"{header.path} cannot be loaded: {reason}") from error
            raise ArgumentError(
                f"{header.path} cannot be run with these arguments: {reason}"
            ) from error


def _no_memory(header: GGUFHeader, reason: str) -> str:
    return (
        f"not enough memory to run {header.path} ({header.file_size >> 20} MiB): {reason}:"
        " give a smaller n_ctx or density, or choose a smaller model"
    )
