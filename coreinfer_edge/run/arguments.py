"""Checks what goes on to llama.cpp: it would die of some, the binding ignores others."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

from coreinfer_edge.binding.llama import OURS
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.errors import (
    ArgumentError,
    ModelFileError,
    UnsupportedModelError,
)
from coreinfer_edge.model.header import GGUFHeader, read_header

DEFAULT_CONTEXT = 4096

# Beyond these llama.cpp ends the process (GGML_MAX_N_THREADS) or the binding cannot pass them on.
LLAMA_LIMITS = {
    "n_threads": 512,
    "n_threads_batch": 512,
    "n_batch": 2**31 - 1,
    "n_ubatch": 2**31 - 1,
}

# The ggml types that llama.cpp keeps keys and values in.
CACHE_TYPES = (
    llama_cpp.GGML_TYPE_F32,
    llama_cpp.GGML_TYPE_F16,
    30,  # BF16, which the binding has no name for
    llama_cpp.GGML_TYPE_Q8_0,
    llama_cpp.GGML_TYPE_Q4_0,
    llama_cpp.GGML_TYPE_Q4_1,
    llama_cpp.GGML_TYPE_IQ4_NL,
    llama_cpp.GGML_TYPE_Q5_0,
    llama_cpp.GGML_TYPE_Q5_1,
)


def check_density(density: float | str) -> None:
    if density != "auto" and not is_share(density):
        raise ArgumentError(
            f"density is {density!r}: it must be above 0 and at most 1 (1 is dense), or 'auto'"
        )


def check_quality(quality: float) -> None:
    if not (is_number(quality) and 0 < quality < math.inf):
        raise ArgumentError(f"quality is {quality!r}: it must be a KL divergence above 0, in nats")


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def is_share(value: Any) -> bool:
    return is_number(value) and bool(0 < float(value) <= 1)


def overridden(header: GGUFHeader, overrides: Mapping[str, Any] | None) -> GGUFHeader:
    """The header as llama.cpp will see it, so that the checks see it too."""
    if overrides is None:
        return header
    if not isinstance(overrides, dict) or not all(isinstance(key, str) for key in overrides):
        raise ArgumentError("kv_overrides must be a dict from metadata keys to values")
    return replace(header, metadata={**header.metadata, **overrides})


def check_llama_arguments(arguments: Mapping[str, Any]) -> None:
    """The binding ignores what it does not know; a slip of the pen should not go unseen."""
    known = inspect.signature(llama_cpp.Llama.__init__).parameters
    for name in arguments:
        if name not in known or name in (*OURS, "self", "kwargs", "model_path"):
            raise ArgumentError(f"{name} is no argument of EdgeLLM or of llama_cpp.Llama")
    for name, most in LLAMA_LIMITS.items():
        value = arguments.get(name)
        if value is not None and not (isinstance(value, int) and 1 <= value <= most):
            raise ArgumentError(f"{name} is {value!r}: it must be a number from 1 to {most}")
    for name in ("type_k", "type_v"):
        if arguments.get(name) not in (None, *CACHE_TYPES):
            raise ArgumentError(
                f"{name} is {arguments[name]!r}: it must be one of the ggml types"
                f" {', '.join(map(str, CACHE_TYPES))}"
            )
    if arguments.get("vocab_only"):
        raise ArgumentError("vocab_only leaves no model to generate with: use llama_cpp.Llama")


def check_lora(path: str | os.PathLike[str], model: GGUFHeader) -> str | None:
    """Refuse what is no adapter, and what cannot be adapted; why it goes with no core set."""
    header = read_header(path)
    if header.get("general.type") != "adapter":
        raise ModelFileError(f"{path} is no LoRA adapter in GGUF form: give lora_path one")
    if "token_embd.weight.lora_a" in header.tensors and model.is_tied:
        # it takes the adapter for one of the output, and ends the process
        raise UnsupportedModelError(
            f"the LoRA adapter {path} changes the embedding, which is the output of this model too;"
            " llama.cpp cannot do that: merge it into the model (llama-export-lora)"
        )
    # compact tensors would miss the change
    changed = sorted(name for name in header.tensors if ".ffn_" in name)
    if not changed:
        return None
    return (
        f"the LoRA adapter {path} changes FFN weights ({changed[0]}), which a core set does not"
        " carry: merge it into the model (llama-export-lora), or use strategy='dense'"
    )


def default_context(header: GGUFHeader) -> int:
    """The context that the model was trained for, at most DEFAULT_CONTEXT tokens."""
    n_ctx = header.of_architecture("context_length")
    trained = n_ctx if isinstance(n_ctx, int) and n_ctx > 0 else DEFAULT_CONTEXT
    return min(DEFAULT_CONTEXT, trained)


def check_positions(header: GGUFHeader, n_ctx: int) -> None:
    """Refuse a context beyond a table of learned positions, which nothing can stand in for."""
    learned = header.of_architecture("context_length")
    if "position_embd.weight" in header.tensors and isinstance(learned, int) and n_ctx > learned:
        raise ArgumentError(
            f"n_ctx is {n_ctx}, and the model has learned {learned} positions: give at most that"
        )


def read_text(file: Path, what: str) -> str:
    """All of a file.

    Raises:
        ArgumentError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ArgumentError(f"{what} {file} cannot be read: {reason}") from error
