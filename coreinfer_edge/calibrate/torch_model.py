"""Loads a Hugging Face model with torch and transformers, into memory or streamed."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coreinfer_edge.errors import InsufficientMemoryError, MissingPackageError, ModelFileError
from coreinfer_edge.run.process_memory import available_bytes

# The module of a layer.
LAYER = r"(?:.*\.)?(?:layers|h|blocks)\.(?P<layer>\d+)"

_M_MMAP_THRESHOLD = -3  # of malloc.h


def import_torch(why: str) -> tuple[Any, Any]:
    """torch and transformers.

    Raises:
        MissingPackageError: they, or accelerate, which streams models, are not installed.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import accelerate  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            f"{why} needs torch, transformers and accelerate ({error}): pip install"
            " 'coreinfer-edge[convert]'"
        ) from error
    return torch, transformers


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a Hugging Face model, without copies in another format."""
    for pattern in ("model*.safetensors", "*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def load_model(folder: Path, n_ff: int, n_tokens: int) -> Any:
    """Load a model that will run over windows, forward and backward.

    The model is in float32 if available memory has room for that twice, else in the type of the
    checkpoint. If that does not fit with the activations of a window, the model is streamed: the
    weights of a layer are read from the checkpoint when they are needed, and freed afterwards. The
    embedding and the output matrix stay in memory.

    Args:
        folder: the folder of the model.
        n_ff: neurons of all its FFNs together.
        n_tokens: tokens of a window.

    Raises:
        InsufficientMemoryError: the model does not fit.
        MissingPackageError: torch, transformers or accelerate is not installed.
        ModelFileError: transformers cannot load the model.
    """
    torch, transformers = import_torch("statistics with gradients")
    n_bytes = sum(path.stat().st_size for path in weight_files(folder))
    available, _ = available_bytes()
    dtype = torch.float32 if 4 * n_bytes < available else "auto"
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    try:
        config = transformers.AutoConfig.from_pretrained(folder).get_text_config()
        fits = n_bytes + _activation_bytes(config, n_ff, n_tokens) < available
        from_pretrained = transformers.AutoModelForCausalLM.from_pretrained
        if dtype != "auto" or fits:
            model = from_pretrained(folder, **options)
        else:
            model = _load_streamed(from_pretrained, folder, options)
    except MemoryError as error:
        raise InsufficientMemoryError(
            f"{folder} does not fit into memory: use the native back end"
        ) from error
    except Exception as error:  # transformers raises whatever its parts raise
        reason = " ".join(str(error).split())
        raise ModelFileError(
            f"transformers cannot load {folder} ({reason[:300]}): check the folder, or use the"
            " native back end"
        ) from error
    return model.eval().requires_grad_(False)


def _activation_bytes(config: Any, n_ff: int, n_tokens: int) -> int:
    """Estimate of the bytes that autograd keeps of a window in float32, for any family.

    Per layer and token: some 10 hidden states, 4 values per neuron, 2 rows of attention per head.
    """
    by_layer = 10 * config.hidden_size + 2 * config.num_attention_heads * n_tokens
    n_floats = config.num_hidden_layers * by_layer + 4 * n_ff + 4 * config.vocab_size
    return 4 * n_tokens * int(n_floats)


def _load_streamed(from_pretrained: Any, folder: Path, options: dict[str, Any]) -> Any:
    """Load a model but leave the weights of its layers on disk; hooks of accelerate fetch them.

    Each layer runs again in the backward pass, because autograd would keep all weights alive.
    """
    # It warns that layers are on the disk, which is intended.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    # Weights in other formats than safetensors are written here again by transformers.
    offload_folder = tempfile.mkdtemp(prefix="coreinfer-")
    try:
        model = from_pretrained(
            folder, device_map=_device_map(folder), offload_folder=offload_folder, **options
        )
    except BaseException:
        shutil.rmtree(offload_folder, ignore_errors=True)
        raise
    weakref.finalize(model, shutil.rmtree, offload_folder, ignore_errors=True)
    _return_freed_memory()
    for name, module in model.named_modules():
        if re.fullmatch(LAYER, name):
            module.forward = _recomputed(module.forward)
    return model


def _device_map(folder: Path) -> dict[str, str]:
    """The layers on the disk, all other modules in memory."""
    import accelerate
    import transformers

    with accelerate.init_empty_weights():
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config)
    names = {name: next(module.children(), None) is None for name, module in model.named_modules()}
    layers = [name for name in names if re.fullmatch(LAYER, name)]
    within = tuple(f"{name}." for name in layers)
    rest = [name for name, leaf in names.items() if leaf and not name.startswith(within)]
    return {**dict.fromkeys(rest, "cpu"), **dict.fromkeys(layers, "disk")}


def _return_freed_memory() -> None:
    """Make glibc return the memory of each tensor when it is freed.

    By default glibc adapts to their sizes and keeps them in its heap, which fragments and grows to
    several times the memory in use.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward pass that saves only its input for the backward pass."""
    from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

    def run(*args: Any, **kwargs: Any) -> Any:
        # Stopping early would skip the hook that frees the weights of the last module.
        with set_checkpoint_early_stop(False):
            return checkpoint(
                forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )

    return run
