"""Plans what a model whose layers GPUs compute takes of main memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coreinfer_edge.binding.core import ContextMemory, devices, has_device
from coreinfer_edge.binding.placement import FfnPlace
from coreinfer_edge.model.ffn import LayerFFN, dense_ffn
from coreinfer_edge.run.memory_plan import (
    PLAN_MARGIN,
    PRIOR_BYTES,
    RESERVE,
    SAMPLING_BYTES,
    STATISTICS_BYTES,
    THREAD_BYTES,
    budget_bytes,
    embedding_rows_bytes,
    least_ahead,
)
from coreinfer_edge.run.planning import PlanRequest, mebibytes
from coreinfer_edge.run.process_memory import private_bytes, release_free_memory
from coreinfer_edge.run.processors import allowed_processors

# What CUDA takes of main memory with the first graph: code of kernels, cuBLAS, memory for copies.
# Measured on an H100 beside 16 threads. Its context is there before anything is counted.
CUDA_HOST_BYTES = 224 << 20

# Rows on their way to a device, of a matrix that is gathered (native/gather.cpp).
STAGED_ROWS = 512


@dataclass(frozen=True)
class HostPlan:
    """What a model will take of main memory, in bytes.

    Attributes:
        budget: what it may take.
        source: what sets the budget: the argument, the machine, or a control group.
        read_ahead: bytes of FFN weights to read ahead, if they stay in the file.
        base: Python, libraries, drivers, vocabulary, and what else this process has already.
        weights: all that are held here.
        embedding: its rows that are held, if they are looked up in the file.
        cache: keys and values of the processor's layers.
        compute: buffers of the largest graph, and of sampling.
        statistics: of the activations.
        streaming: the FFN weights that are in memory during pre-fill.
        core: core sets of the processor's layers, and gathering all.
    """

    budget: int
    source: str
    read_ahead: int
    base: int
    weights: int
    embedding: int
    cache: int
    compute: int
    statistics: int
    streaming: int
    core: int

    @property
    def total(self) -> int:
        parts = (self.weights, self.embedding, self.cache, self.compute, self.statistics)
        return self.base + sum(parts) + self.streaming + self.core

    @property
    def fits(self) -> bool:
        return self.total <= int(self.budget * (1 - RESERVE))

    def as_dict(self) -> dict[str, Any]:
        """The plan in types that JSON has."""
        return {**dataclasses.asdict(self), "total": self.total, "fits": self.fits}

    def refusal(self) -> str:
        """Why it does not fit, and what would."""
        needed = int(self.total / (1 - RESERVE)) + PLAN_MARGIN
        parts = {
            "Python, drivers and vocabulary": self.base,
            "weights": self.weights + self.embedding,
            "cache": self.cache,
            "computing": self.compute + self.statistics,
            "reading FFN weights": self.streaming,
            "core set": self.core,
        }
        figures = ", ".join(f"{name} {mebibytes(size)}" for name, size in parts.items() if size)
        return (
            f"into {mebibytes(self.budget)} of main memory ({self.source}): it needs"
            f" {mebibytes(needed)} ({figures}). What would fit: memory of {mebibytes(needed)}"
        )


class HostPlanner:
    """Plans the main memory of one model.

    Args:
        request: the model, and how it is to run.
        memory: the budget: a size, or ``"auto"``.
    """

    def __init__(self, request: PlanRequest, memory: int | str) -> None:
        release_free_memory()  # of models that are closed: their memory would count as used
        has_device()  # drivers that load with it are there before anything is counted
        self._budget, self._source = budget_bytes(memory)
        self._request = request
        self._ffn = dense_ffn(request.header)

    def base(self) -> int:
        """What the process has, with the model that is loaded without its weights, and drivers."""
        release_free_memory()
        is_cuda = any(device.is_cuda for device in devices())
        return (private_bytes() or 0) + (CUDA_HOST_BYTES if is_cuda else 0)

    def plan(
        self,
        memory: ContextMemory,
        base: int,
        n_vocab: int,
        n_batch: int,
        density: float | None,
        on_cpu: Mapping[int, LayerFFN],
        ffn: FfnPlace,
        n_outputs: int,
    ) -> HostPlan:
        """The plan of a context with these sizes.

        Args:
            memory: of the context, in main memory.
            base: as ``base()`` gave it.
            n_vocab: tokens of the vocabulary.
            n_batch: tokens that a graph evaluates at once.
            density: of the core sets, None if there are none.
            on_cpu: FFNs of the processor's layers.
            ffn: where the FFN weights lie.
            n_outputs: tokens whose logits are asked for at once, 0 for all.
        """
        widths = [of.width for of in self._ffn.values()]
        widest = max(widths, default=0)
        in_file = ffn == "file"
        largest = max((of.weight_bytes for of in self._ffn.values()), default=0)
        threads = int(self._request.llama_kwargs.get("n_threads_batch") or allowed_processors())
        row_bytes = max(
            (of.weight_bytes // max(1, of.width) for of in self._ffn.values()), default=0
        )
        statistics = core = 0
        if density is not None:
            statistics = (STATISTICS_BYTES + PRIOR_BYTES) * sum(widths)
            core = threads * (THREAD_BYTES + 8 * widest + 2 * STAGED_ROWS * row_bytes)
            core += sum(
                of.n_bytes if density >= 1 else of.level_bytes(density) for of in on_cpu.values()
            )
        logits = n_vocab * (4 * (n_outputs or n_batch) + SAMPLING_BYTES)
        ahead = least_ahead() + largest
        return HostPlan(
            budget=self._budget,
            source=self._source,
            read_ahead=ahead if in_file else 0,
            base=base,
            weights=memory.weights,
            embedding=embedding_rows_bytes(self._request.header, n_batch, self._request.is_adapted)
            if in_file
            else 0,
            cache=memory.cache,
            compute=memory.compute + 2 * n_batch * widest + logits,
            statistics=statistics,
            streaming=largest + ahead if in_file else 0,
            core=core,
        )
