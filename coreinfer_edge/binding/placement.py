"""Where the weights of a model go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from coreinfer_edge.binding import core
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.errors import UnsupportedModelError

FFN_WEIGHTS = r"^blk\.\d+\.ffn_(up|gate|down)\.weight$"
EMBEDDING = r"^token_embd\.weight$"


# Where the weights of the FFNs lie: with the other weights of their layers, in main memory, or in
# the file.
FfnPlace = Literal["device", "host", "file"]


@dataclass(frozen=True)
class DevicePlacement:
    """Where weights go with budgets of the memory of GPUs.

    Attributes:
        counts: how many of the last layers each GPU computes, in the order of ``core.devices()``;
            the output counts as one.
        ffn: where the weights of the FFNs lie. Those elsewhere are copied over when a batch needs
            them.
        n_outputs: logits are asked for at no more than so many tokens at once.
        whole_embedding: as in ``Placement``.
        read_ahead: as in ``Placement``.
        without_data: load no weights at all, to see what would be needed.
        flash_attn: None for where a device has it: it takes less memory, and needs no cuBLAS.
    """

    counts: tuple[int, ...]
    ffn: FfnPlace
    n_outputs: int
    whole_embedding: bool = False
    read_ahead: int = 0
    without_data: bool = False
    flash_attn: bool | None = None

    @property
    def streamed(self) -> bool:
        """Whether the weights of the FFNs stay in the file."""
        return self.ffn == "file"

    @property
    def dense_is_dear(self) -> bool:
        """Whether a token costs much more dense than with a core set."""
        return self.ffn != "device"

    def llama_arguments(self, files: Sequence[Path]) -> dict[str, Any]:
        """The arguments of ``Llama`` that place the weights.

        Raises:
            UnsupportedModelError: weights cannot stay in the file on this system.
        """
        overrides: dict[str, int] = {}
        if self.ffn == "host":
            overrides = {FFN_WEIGHTS: core.host_buffer_type()}
        elif self.ffn == "file":
            overrides = _unread(self.whole_embedding)
        alone = len(self.counts) == 1
        return {
            "n_gpu_layers": sum(self.counts),
            "split_mode": llama_cpp.LLAMA_SPLIT_MODE_NONE
            if alone
            else llama_cpp.LLAMA_SPLIT_MODE_LAYER,
            "tensor_split": None if alone else [float(n) for n in self.counts],
            "tensor_buft_overrides": overrides,
            "no_alloc": self.without_data,
            # what is mapped is copied over at a fraction of the speed of what is pinned
            "use_mmap": self.ffn == "device" and not self.without_data,
            "n_outputs_max": self.n_outputs,
            "flash_attn": self.flash_attn,
        }


def _unread(whole_embedding: bool) -> dict[str, int]:
    """Buffer types of weights that stay in the file, by the pattern of their names."""
    unread = core.unread_buffer_type()
    if unread is None:
        raise UnsupportedModelError(
            "a model larger than the memory it is given runs on Linux only: leave memory out"
        )
    return dict.fromkeys((FFN_WEIGHTS, EMBEDDING)[: 1 if whole_embedding else 2], unread)


@dataclass(frozen=True)
class Placement:
    """Where weights go: all into private memory, but those of the FFNs if they are streamed.

    Attributes:
        streamed: the weights of the FFNs stay in the file, and so do the rows of the embedding
            until they are looked up. An embedding that is the output too is in memory as that.
        n_outputs: logits are asked for at no more than so many tokens at once.
        whole_embedding: the embedding is in memory in any case: a LoRA adapter may change it.
        read_ahead: bytes of streamed weights to read ahead.
        without_data: load no weights at all, to see what would be needed.
        keeps_cache: leave the file in the page cache, for the next that loads it.
    """

    streamed: bool
    n_outputs: int
    whole_embedding: bool = False
    read_ahead: int = 0
    without_data: bool = False
    keeps_cache: bool = False

    @property
    def dense_is_dear(self) -> bool:
        """Whether a token costs much more dense than with a core set."""
        return self.streamed

    def llama_arguments(self, files: Sequence[Path]) -> dict[str, Any]:
        """The arguments of ``Llama`` that place the weights.

        Args:
            files: the GGUF files of the model.

        Raises:
            UnsupportedModelError: weights cannot stay in the file on this system.
        """

        def leave_page_cache(progress: float) -> bool:
            """Called before each tensor: those before it are in private memory by now."""
            for path in files:
                with suppress(OSError), open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return True

        return {
            # A mapped file is read as a whole; a device would copy weights before they are there.
            "use_mmap": False,
            "op_offload": False,
            "tensor_buft_overrides": self._overrides(),
            "no_alloc": self.without_data,
            "n_outputs_max": self.n_outputs,
            "progress_callback": None
            if self.keeps_cache or not hasattr(os, "posix_fadvise")
            else leave_page_cache,
        }

    def _overrides(self) -> dict[str, int]:
        """Buffer types by the pattern of the names of their tensors."""
        return _unread(self.whole_embedding) if self.streamed else {}
