"""What a Llama would take that is not there: for plans of models that nobody has downloaded yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coreinfer_edge.binding.core import ContextMemory, has_device, has_kernels
from coreinfer_edge.model.ffn import dense_ffn
from coreinfer_edge.model.header import GGUFHeader
from coreinfer_edge.run.needed_memory import cached_numbers_per_token, padded_context
from coreinfer_edge.run.process_memory import private_bytes

# Measured: what llama.cpp keeps of a token of the vocabulary.
_VOCABULARY_BYTES = 120
_F16 = 2
_F32 = 4


class AbsentModel:
    """Stands for a model of which there is a header alone, without a file.

    The formulas are those of llama.cpp's graph of a Llama: three tensors as wide as the FFN are in
    memory at once, beside some as wide as the model; or, without flash attention, how much each
    token attends to each other. ``tests/doctor`` holds them against llama.cpp's own count.

    Args:
        header: of the model; ``files`` is empty.
        streamed: whether the FFN weights and the embedding stay in the file.
        llama_kwargs: arguments of ``llama_cpp.Llama``, ``n_ctx`` and ``packed`` among them.
    """

    def __init__(self, header: GGUFHeader, streamed: bool, llama_kwargs: Mapping[str, Any]) -> None:
        embedding = header.tensors["token_embd.weight"]
        self._header, self._streamed = header, streamed
        self._packed = bool(llama_kwargs.get("packed")) and has_kernels()
        self._n_ctx = padded_context(int(llama_kwargs["n_ctx"]))
        self.n_vocab = embedding.shape[1]
        self.base = (private_bytes() or 0) + _VOCABULARY_BYTES * self.n_vocab

    def memory(self, n_batch: int) -> ContextMemory:
        """What a context takes that evaluates so many tokens at once."""
        weights = self._weights()
        return ContextMemory(
            weights=weights,
            packed=weights if self._packed else 0,
            cache=self._n_ctx * cached_numbers_per_token(self._header) * _F16,
            compute=n_batch * self._computing_bytes(),
        )

    def _weights(self) -> int:
        total = sum(tensor.n_bytes for tensor in self._header.tensors.values())
        embedding = self._header.tensors["token_embd.weight"].n_bytes
        if not self._streamed:
            # llama.cpp's layouts cannot look rows up, so a tied embedding is there twice
            return total + (embedding if self._header.is_tied and not self._packed else 0)
        ffn = sum(layer.weight_bytes for layer in dense_ffn(self._header).values())
        return total - ffn - (0 if self._header.is_tied else embedding)

    def _computing_bytes(self) -> int:
        """Of a token in a batch."""
        width, n_ff, heads, kv_heads = (
            int(str(self._header.of_architecture(key)))
            for key in (
                "embedding_length",
                "feed_forward_length",
                "attention.head_count",
                "attention.head_count_kv",
            )
        )
        if self._packed and not has_device():  # flash attention is on then
            return _F32 * (3 * n_ff + 4 * width) + _F16 * self._n_ctx
        kv_width = width // heads * kv_heads
        ffn = 3 * n_ff + 3 * width + 2 * kv_width
        attention = heads * self._n_ctx + 5 * width + 2 * kv_width
        return _F32 * (max(ffn, attention) + self._n_ctx)

    def __enter__(self) -> AbsentModel:
        return self

    def __exit__(self, *exception: object) -> None:
        pass
