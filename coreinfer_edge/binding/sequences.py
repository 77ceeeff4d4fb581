"""A context for measuring: sequences that go on from one prompt, dense or with a core set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from coreinfer_edge.binding import forked
from coreinfer_edge.binding.core import CoreContext
from coreinfer_edge.binding.llama import Llama
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.choose.statistics import Floats
from coreinfer_edge.errors import (
    ArgumentError,
    InsufficientMemoryError,
    NativeError,
    UnsupportedModelError,
)


class Sequences:
    """A second llama.cpp context on a loaded model, with its own core path.

    Args:
        llama: whose model, threads and cache types to use.
        files: the GGUF files of the model.
        n_ctx: tokens of all sequences together; a shared prompt counts once.
        n_sequences: how many there can be, numbered from 0.
        n_logits: most tokens evaluated at once with their logits.

    Closing ``llama`` closes it too. For one thread only.
    """

    def __init__(
        self,
        llama: Llama,
        files: Sequence[Path],
        n_ctx: int,
        n_sequences: int,
        n_logits: int,
    ) -> None:
        params = llama_cpp.llama_context_params.from_buffer_copy(llama.context_params)
        params.n_ctx = -(-n_ctx // 256) * 256
        params.n_seq_max = n_sequences
        params.kv_unified = True
        params.n_batch = max(n_logits, n_sequences)  # llama.cpp aborts on more sequences than that
        params.n_ubatch = min(params.n_ubatch, params.n_batch)
        self._llama = llama  # the model must outlive the context
        self._n_vocab = llama.n_vocab()
        self._ctx = llama_cpp.llama_init_from_model(llama.model, params)
        if not self._ctx:
            raise InsufficientMemoryError(
                f"no memory for a second context of {params.n_ctx} tokens to measure in"
            )
        self._memory = llama_cpp.llama_get_memory(self._ctx)
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self._n_batch = params.n_batch
        self._gone: str | None = None
        try:
            self.core = CoreContext(self._ctx, files, llama.n_threads_batch, llama.packed)
        except BaseException:
            self._free()
            raise
        llama.add_dependent(self)
        forked.watch(self)

    def evaluate(self, sequence: int, start: int, tokens: Sequence[int]) -> None:
        """Add tokens to a sequence at position ``start``; logits of the last one only."""
        for i in range(0, len(tokens), self._n_batch):
            part = tokens[i : i + self._n_batch]
            self._decode(sequence, start + i, part, int(i + len(part) == len(tokens)))

    def logits(self, sequence: int, start: int, tokens: Sequence[int]) -> Floats:
        """Add tokens, at most ``n_logits``, to a sequence; the logits of each [n, n_vocab]."""
        self._decode(sequence, start, tokens, len(tokens))
        values = llama_cpp.llama_get_logits(self._ctx)
        result: Floats = np.ctypeslib.as_array(values, shape=(len(tokens), self._n_vocab)).copy()
        return result

    def _decode(self, sequence: int, start: int, tokens: Sequence[int], n_logits: int) -> None:
        """Evaluate at most one batch of tokens, the last ``n_logits`` of them with logits."""
        self._check_open()
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = start + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i >= len(tokens) - n_logits
        if status := llama_cpp.llama_decode(self._ctx, batch):
            n_learned = llama_cpp.llama_model_n_ctx_train(self._llama.model)
            if start + len(tokens) > n_learned:
                raise ArgumentError(
                    f"a text of {start + len(tokens)} tokens is longer than the {n_learned}"
                    " positions that the model has learned: give shorter ones"
                )
            raise NativeError(f"llama_decode failed with status {status} while measuring")

    def copy(self, source: int, target: int, end: int = -1) -> None:
        """Let a sequence begin as another is now, up to position ``end`` (-1: all of it)."""
        self._check_open()
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, end)
        if end >= 0 and llama_cpp.llama_memory_seq_pos_max(self._memory, target) != end - 1:
            raise UnsupportedModelError(
                "this model's cache cannot take tokens back, which estimating quality needs: give"
                " densities, and no estimate"
            )

    def remove(self, sequence: int, start: int = -1) -> None:
        """Take a sequence back to position ``start``; -1 empties it."""
        self._check_open()
        if not llama_cpp.llama_memory_seq_rm(self._memory, sequence, start, -1):
            raise UnsupportedModelError(
                "this model's cache cannot take tokens back, which measuring refresh needs"
            )

    def clear(self) -> None:
        """Empty all sequences."""
        self._check_open()
        llama_cpp.llama_memory_clear(self._memory, False)

    def _check_open(self) -> None:
        if self._gone is not None:
            raise ArgumentError(self._gone)

    def _free(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._ctx)

    def close(self) -> None:
        """Free the context; calling it again does nothing."""
        if self._gone is None:
            self._gone = "these sequences are closed, or the model that they are of"
            self.core.close()
            self._free()

    def abandon(self, reason: str) -> None:
        """Let go of the native context without freeing it; see ``forked``."""
        self._gone = reason
