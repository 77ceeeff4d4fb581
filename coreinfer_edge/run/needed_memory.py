"""Refuses a model or a context that cannot fit: the system would end the process without a word."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from coreinfer_edge.errors import InsufficientMemoryError
from coreinfer_edge.model.ffn import dense_ffn
from coreinfer_edge.model.header import GGUFArray, GGUFHeader
from coreinfer_edge.run.arguments import default_context
from coreinfer_edge.run.process_memory import address_space_left, available_bytes

# What else is allocated once a model is loaded, at least: the vocabulary, small buffers. SmolLM2 in
# a control group: 32 MiB between this check and the first token.
_ELSE = 24 << 20
# Address space of a thread: a stack of 8 MiB and an arena of 64 MiB (glibc).
_THREAD_SPACE = 72 << 20
# llama_cpp.Llama's
_N_BATCH = 512
_N_UBATCH = 512
# llama.cpp rounds a context up to these
_CONTEXT_STEP = 256
# The shortest context to fall back to where none was asked for.
_LEAST_CONTEXT = 512


def fitting_context(
    header: GGUFHeader, n_ctx: int | None, arguments: Mapping[str, Any], core_bytes: int = 0
) -> int:
    """The context to load with: the one given, or the default, made shorter where memory is short.

    Only what is sure to be needed counts. A mapped file need not fit: its pages can be read again.

    Args:
        header: of the model.
        n_ctx: the context that was asked for, None for the default.
        arguments: of ``llama_cpp.Llama``; its layers are on the CPU.
        core_bytes: the least that a core set will take.

    Raises:
        InsufficientMemoryError: what was asked for cannot fit, or nothing can.
    """
    wanted = default_context(header) if n_ctx is None else n_ctx
    available, source = _available(header, arguments)
    fixed = _ELSE + core_bytes + _weight_bytes(header, arguments)
    found = wanted
    while n_ctx is None and found > _LEAST_CONTEXT:
        if fixed + sum(_context_bytes(header, found, arguments)) <= available:
            break
        found = max(_LEAST_CONTEXT, found // 2)
    cache, scratch = _context_bytes(header, found, arguments)
    if fixed + cache + scratch > available:
        rest = (fixed - core_bytes) >> 20
        core = f", a core set {core_bytes >> 20} MiB" if core_bytes else ""
        raise InsufficientMemoryError(
            f"not enough memory to run {header.path} ({header.file_size >> 20} MiB): a context of"
            f" {found} tokens needs about {cache >> 20} MiB for its cache and"
            f" {scratch >> 20} MiB to evaluate a long prompt, all else {rest} MiB{core},"
            f" and {available >> 20} MiB of memory are available ({source}): give a smaller n_ctx"
            + (", a smaller density" if core_bytes else "")
        )
    if found < wanted:
        warnings.warn(
            f"{available >> 20} MiB of memory are available ({source}): the context is {found}"
            f" tokens instead of {wanted}; set n_ctx to have another",
            RuntimeWarning,
            stacklevel=3,
        )
    return found


def has_room_for_weights(
    header: GGUFHeader, n_ctx: int, arguments: Mapping[str, Any], core_bytes: int = 0
) -> bool:
    """Whether all weights fit into memory of their own, where a mapped file need not be.

    Args: as for ``fitting_context``.
    """
    arguments = {"flash_attn": True, **arguments}  # as the layout of our kernels has it
    needed = _ELSE + core_bytes + sum(tensor.n_bytes for tensor in header.tensors.values())
    needed += sum(_context_bytes(header, n_ctx, arguments))
    return needed <= _available(header, arguments)[0]


def core_set_bytes(header: GGUFHeader, density: float | str | None) -> int:
    """The least that a core set of this density takes, with the layers that the strategy spares.

    Those stay dense and are not copied; the others have at least half the density. Nothing is
    counted for ``"auto"``, which can choose less, or for None.
    """
    if not isinstance(density, int | float) or density >= 1:
        return 0
    n_bytes = sum(layer.weight_bytes for layer in dense_ffn(header).values())
    # of a layers' share k dense the others have (density - k) / (1 - k), at least density / 2
    return int(n_bytes * density * (1 - density) / (2 - density))


def _available(header: GGUFHeader, arguments: Mapping[str, Any]) -> tuple[int, str]:
    """The bytes that the model can still take beside its mapped file, and what limits them."""
    left = _address_space_beside(header, arguments)
    if left is None:
        return available_bytes()
    of_process = (left, "the limit on the address space, ulimit -v")
    return min(available_bytes(), of_process, key=lambda limit: limit[0])


def _address_space_beside(header: GGUFHeader, arguments: Mapping[str, Any]) -> int | None:
    """What a limit on the address space leaves beside what is only reserved; None without one.

    That is the mapped file, the logits of a batch (ours and llama.cpp's), and for each thread a
    stack and an arena of the allocator. OpenMP ends the process if it can start no thread.
    """
    left = address_space_left()
    if left is None:
        return None
    if header.file_size > left:
        raise InsufficientMemoryError(
            f"{header.path} has {header.file_size >> 20} MiB, and the limit on the address space of"
            f" this process leaves {left >> 20} MiB: raise it (ulimit -v), or choose a smaller"
            " model"
        )
    tokens = header.get("tokenizer.ggml.tokens")
    n_vocab = tokens.length if isinstance(tokens, GGUFArray) else 0
    logits = 2 * 4 * n_vocab * (arguments.get("n_batch") or _N_BATCH)
    n_threads = max(arguments.get(name) or 1 for name in ("n_threads", "n_threads_batch"))
    return max(0, left - header.file_size - logits - n_threads * _THREAD_SPACE)


def _weight_bytes(header: GGUFHeader, arguments: Mapping[str, Any]) -> int:
    """Weights that must be in memory of their own."""
    if arguments.get("use_mmap", True):
        return 0
    return sum(tensor.n_bytes for tensor in header.tensors.values())


def padded_context(n_ctx: int) -> int:
    """The context that llama.cpp makes of this one."""
    return n_ctx + -n_ctx % _CONTEXT_STEP


def _context_bytes(header: GGUFHeader, n_ctx: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """The cache of a context, and what evaluating it takes once it is full, at least."""
    n_ctx = padded_context(n_ctx)
    # a quantised cache takes a quarter or more
    bytes_each = 2.0 if arguments.get("type_k") is arguments.get("type_v") is None else 0.5
    cache = int(n_ctx * cached_numbers_per_token(header) * bytes_each)

    n_batch = min(n_ctx, arguments.get("n_batch") or _N_BATCH)
    n_at_once = min(n_batch, arguments.get("n_ubatch") or _N_UBATCH)
    n_head = _number(header, "attention.head_count")
    # how much each token attends to each other, in F32, and which it may
    rows = 1 + (0 if arguments.get("flash_attn") else n_head)
    widths = 3 * _number(header, "embedding_length") + _number(header, "feed_forward_length")
    return cache, 4 * n_at_once * (n_ctx * rows + widths) if n_head else 0


def _number(header: GGUFHeader, key: str) -> int:
    value = header.of_architecture(key)
    return value if isinstance(value, int) else 0


def cached_numbers_per_token(header: GGUFHeader) -> int:
    """Keys and values per token, or 0 where the architecture keeps fewer than all of them."""
    n_head, n_head_kv = (
        _number(header, "attention.head_count"),
        _number(header, "attention.head_count_kv"),
    )
    if not n_head or any(
        header.of_architecture(key) is not None
        for key in ("attention.sliding_window", "attention.kv_lora_rank", "ssm.state_size")
    ):
        return 0
    if not n_head_kv:
        if header.of_architecture("attention.head_count_kv") is not None:
            return 0  # a list: not the same in all layers
        n_head_kv = n_head
    width = _number(header, "embedding_length") // n_head
    key, value = _number(header, "attention.key_length"), _number(header, "attention.value_length")
    return header.n_layers * n_head_kv * ((key or width) + (value or width))
