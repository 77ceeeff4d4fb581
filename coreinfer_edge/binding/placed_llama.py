"""llama_cpp.Llama with a say in where the weights of the model go."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreinfer_edge.binding import core
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.errors import UnsupportedModelError
from coreinfer_edge.model.chat_templates import CheckedLlama

FFN_WEIGHTS = rb"^blk\.\d+\.ffn_(up|gate|down)\.weight$"
EMBEDDING = rb"^token_embd\.weight$"


@dataclass(frozen=True)
class Placement:
    """Where weights go: all into private memory, but those of the FFNs if they are streamed.

    Attributes:
        streamed: the weights of the FFNs stay in the file, and so do the rows of the embedding
            until they are looked up. An embedding that is the output too is in memory as that.
        n_outputs: logits are asked for at no more than so many tokens at once.
        adapted: a LoRA adapter may change the embedding, which is in memory then.
        read_ahead: bytes of streamed weights to read ahead.
        without_data: load no weights at all, to see what would be needed.
    """

    streamed: bool
    n_outputs: int
    adapted: bool = False
    read_ahead: int = 0
    without_data: bool = False


class _BufferTypeOverride(ctypes.Structure):
    # llama_model_tensor_buft_override
    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


class PlacedLlama(CheckedLlama):
    """``CheckedLlama`` whose weights go where ``placement`` says; as ever if it is None.

    Args:
        placement: where the weights go.
        files: the GGUF files of the model. With a placement the page cache keeps nothing of them.
        **llama_kwargs: arguments of ``llama_cpp.Llama``.
    """

    def __init__(
        self, *, placement: Placement | None, files: Sequence[Path], **llama_kwargs: Any
    ) -> None:
        self._placement = placement
        if placement is None:
            super().__init__(**llama_kwargs)
            return
        # mapped, a file is read as a whole; and a device would copy weights before they are there
        llama_kwargs.update(use_mmap=False, op_offload=False)
        with ExitStack() as opened:
            self._load_files = [opened.enter_context(open(path, "rb")) for path in files]
            super().__init__(**llama_kwargs)
            self._leave_page_cache(1.0, None)
            self._load_files = []

    # The binding makes both from llama.cpp's defaults, and has no arguments for what is set here.

    @property
    def model_params(self) -> Any:
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        self._model_params = params
        if self._placement is None:
            return
        self._overrides = _overrides(self._placement)
        params.tensor_buft_overrides = ctypes.addressof(self._overrides)
        params.no_alloc = self._placement.without_data
        if not self._placement.without_data and hasattr(os, "posix_fadvise"):
            self._progress = llama_cpp.llama_progress_callback(self._leave_page_cache)
            params.progress_callback = self._progress

    @property
    def context_params(self) -> Any:
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        self._context_params = params
        if self._placement is not None:
            params.n_outputs_max = self._placement.n_outputs

    def _leave_page_cache(self, progress: float, data: object) -> bool:
        """Called before each tensor: those before it are in memory of their own by now."""
        for file in self._load_files:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return True


def _overrides(placement: Placement) -> Any:
    overrides: list[tuple[bytes, int]] = []
    if placement.streamed:
        unread = core.unread_buffer_type()
        if unread is None:
            raise UnsupportedModelError(
                "a model larger than the memory it is given runs on Linux only: leave memory out"
            )
        overrides.append((FFN_WEIGHTS, unread))
        if not placement.adapted:
            overrides.append((EMBEDDING, unread))
    array = (_BufferTypeOverride * (len(overrides) + 1))()  # the last one stays empty
    for place, (pattern, buffer_type) in zip(array, overrides, strict=False):
        place.pattern, place.buffer_type = pattern, buffer_type
    return array
