"""Where the weights of a model go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreinfer_edge.binding import core
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.errors import UnsupportedModelError

FFN_WEIGHTS = r"^blk\.\d+\.ffn_(up|gate|down)\.weight$"
EMBEDDING = r"^token_embd\.weight$"


@dataclass(frozen=True)
class DevicePlacement:
    """Where weights go with a budget of a GPU's memory.

    Attributes:
        n_gpu_layers: the last layers that the GPU computes, and one more for the output.
        ffn_on_host: the weights of the FFNs are in main memory, and copied over when a batch needs
            them.
        n_outputs: logits are asked for at no more than so many tokens at once.
        without_data: load no weights at all, to see what would be needed.
    """

    n_gpu_layers: int
    ffn_on_host: bool
    n_outputs: int
    without_data: bool = False
    streamed = False

    @property
    def dense_is_dear(self) -> bool:
        """Whether a token costs much more dense than with a core set."""
        return self.ffn_on_host

    def llama_arguments(self, files: Sequence[Path]) -> dict[str, Any]:
        """The arguments of ``Llama`` that place the weights."""
        overrides = {FFN_WEIGHTS: core.host_buffer_type()} if self.ffn_on_host else {}
        return {
            "n_gpu_layers": self.n_gpu_layers,
            "split_mode": llama_cpp.LLAMA_SPLIT_MODE_NONE,
            "tensor_buft_overrides": overrides,
            "no_alloc": self.without_data,
            # what is mapped is copied over at a fraction of the speed of what is pinned
            "use_mmap": not (self.ffn_on_host or self.without_data),
            "n_outputs_max": self.n_outputs,
        }


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
        if not self.streamed:
            return {}
        unread = core.unread_buffer_type()
        if unread is None:
            raise UnsupportedModelError(
                "a model larger than the memory it is given runs on Linux only: leave memory out"
            )
        return dict.fromkeys((FFN_WEIGHTS, EMBEDDING)[: 1 if self.whole_embedding else 2], unread)
