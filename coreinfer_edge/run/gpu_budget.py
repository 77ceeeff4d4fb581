"""Budgets of the memory of GPUs, and what CUDA takes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from coreinfer_edge.binding.core import Device
from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.model.header import GGUFHeader
from coreinfer_edge.run.planning import AUTO_MARGIN, parse_size

# Left free of what a GPU has ("auto"): a screen, and other programs, may want some.
AUTO_MARGIN_LEAST = 128 << 20

# Taken by CUDA itself: its context, and then, with the first graph, the code of ggml's kernels, and
# the inputs of products as integers; and cuBLAS, where something needs it. Measured on an H200
# (docs/gpu.md). "auto" need not know the first: it asks what is free beside it.
CUDA_BYTES = 266 << 20
CUDA_WITH_STACKS = 530 << 20  # where these cannot be spared
CUDA_RUN_BYTES = 128 << 20
CUBLAS_BYTES = 128 << 20

# A buffer is rounded up to this.
CUDA_GRANULARITY = 2 << 20

# Heads that CUDA's flash attention has kernels for (ggml-cuda/fattn.cu).
_HEAD_SIZES = (64, 80, 96, 112, 128, 256)


class Budget(NamedTuple):
    """What a model may take of one GPU, what sets that, and what CUDA's context takes of it."""

    n_bytes: int
    source: str
    driver: int


def parse_budgets(gpu_memory: int | str | Sequence[int | str]) -> list[int | str]:
    """The budgets of the GPUs in order; one is for each of them.

    Args:
        gpu_memory: a size or ``"auto"``, or several, in a sequence or separated by commas.

    Raises:
        ArgumentError: it is none of these.
    """
    if isinstance(gpu_memory, str):
        sizes: Sequence[int | str] = [size.strip() for size in gpu_memory.split(",")]
    else:
        sizes = gpu_memory if isinstance(gpu_memory, Sequence) else [gpu_memory]
    if not sizes:
        raise ArgumentError("gpu_memory is empty: give a size, or 'auto'")
    return [size if size == "auto" else parse_size(size, "gpu_memory") for size in sizes]


def budget_of(size: int | str, device: Device, cuda: int = CUDA_BYTES) -> Budget:
    """The budget that one size, or ``"auto"``, means on this GPU; CUDA's context takes ``cuda``."""
    if isinstance(size, str):
        free = device.free - max(AUTO_MARGIN_LEAST, int(AUTO_MARGIN * device.free))
        # of an RPC server the description is its address
        of = device.name if device.is_remote else device.description
        return Budget(max(0, free), f"free on {of}", 0)
    return Budget(size, "gpu_memory", cuda if device.is_cuda else 0)


def cuda_run_bytes(header: GGUFHeader, llama_kwargs: Mapping[str, Any]) -> int:
    """What CUDA takes of a GPU once a graph has run, beside its context and llama.cpp's buffers."""
    return CUDA_RUN_BYTES + (CUBLAS_BYTES if _needs_cublas(header, llama_kwargs) else 0)


def _needs_cublas(header: GGUFHeader, llama_kwargs: Mapping[str, Any]) -> bool:
    """Whether there are products of matrices that are not quantised, as keys and values."""
    n_head, n_embd = (
        header.of_architecture(key) for key in ("attention.head_count", "embedding_length")
    )
    by_default = n_embd // n_head if isinstance(n_head, int) and isinstance(n_embd, int) else 0
    head_size = header.of_architecture("attention.key_length") or by_default
    if llama_kwargs.get("flash_attn") is False or head_size not in _HEAD_SIZES:
        return True
    if llama_kwargs.get("lora_path"):
        return True
    return any(
        len(tensor.shape) > 1 and tensor.type in ("f32", "f16", "bf16")
        for name, tensor in header.tensors.items()
        if name.startswith(("blk.", "output.")) or (header.is_tied and name == "token_embd.weight")
    )
