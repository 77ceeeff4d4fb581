"""What a llama.cpp model computes, in plain numpy: the yardstick for the core graph.

It shares nothing with the code under test: it reads the GGUF with gguf-py, and computes in float64,
one token sequence at a time, without a cache. It covers the dense llama, qwen3, gemma3, phi3, gpt2,
opt and starcoder2. Read it from top to bottom: the file, the layers in order, then the formulas.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Core = Mapping[int, NDArray[np.integer[Any]]]
Fill = Mapping[int, Array]

ARCHS = ("llama", "qwen3", "gemma3", "phi3", "gpt2", "opt", "starcoder2")


class Reference:
    """One GGUF model.

    Args:
        path: The file.
        dtype: Of all computation. float64 leaves llama.cpp's own rounding as the only error.
        gelu_table: Round the argument and the value of GELU to half precision, as the table does
            by which ggml computes it on the CPU. False gives the formula itself.

    Raises:
        ValueError: An architecture, or a feature of one, that this file does not compute.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: type[np.floating[Any]] = np.float64,
        gelu_table: bool = True,
    ) -> None:
        reader = gguf.GGUFReader(path)
        self.dtype = dtype
        self.gelu_table = gelu_table
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.dequantized: dict[str, Array] = {}
        self.fields = reader.fields
        self.arch = str(self.fields["general.architecture"].contents())
        if self.arch not in ARCHS:
            raise ValueError(f"the reference has no {self.arch}: one of {', '.join(ARCHS)}")
        if "blk.0.ffn_gate_inp.weight" in self.tensors:
            raise ValueError("the reference has no mixture of experts")
        has_long_rope = "rope_factors_long.weight" in self.tensors
        if has_long_rope or self.key("rope.scaling.type", "none") != "none":
            raise ValueError("the reference has no rope scaling")
        if self.key("final_logit_softcapping", 0.0):
            raise ValueError("the reference has no logit soft-capping")

        self.n_layer = int(self.key("block_count"))
        self.n_embd = int(self.key("embedding_length"))
        self.n_ff = int(self.key("feed_forward_length"))
        self.n_head = int(self.key("attention.head_count"))
        self.n_head_kv = int(self.key("attention.head_count_kv", self.n_head))
        self.head_dim = int(self.key("attention.key_length", self.n_embd // self.n_head))
        self.n_vocab = self.weight("token_embd").shape[0]
        # The others: RMS norm, no bias.
        self.has_layer_norm = self.arch in ("gpt2", "opt", "starcoder2")
        self.has_positions = self.arch in ("gpt2", "opt")  # learned; the others: rope
        norm = "layer_norm_epsilon" if self.has_layer_norm else "layer_norm_rms_epsilon"
        self.eps = float(self.key(f"attention.{norm}"))
        self.rope_dims = int(self.key("rope.dimension_count", self.head_dim))
        self.rope_base = float(self.key("rope.freq_base", 10000.0))
        self.rope_base_swa = float(self.key("rope.freq_base_swa", 10000.0))
        self.window = int(self.key("attention.sliding_window", 0)) if self.arch == "gemma3" else 0

    def logits(
        self,
        tokens: Sequence[int],
        core: Core | None = None,
        fill: Fill | None = None,
        core_from: int = 0,
    ) -> NDArray[np.float32]:
        """Logits after each token.

        Args:
            tokens: Token ids, from position 0.
            core: Per layer, the indices of the neurons kept. The activations of the others, which
                enter ffn_down, are set to zero; layers without an entry stay dense.
            fill: Per layer, what neurons left out are set to instead of zero. Shape: [n_ff].
            core_from: The position of the first token that runs with the core set. Those before
                it run dense, and what they left in the KV cache is what later ones attend to.

        Returns:
            Shape [n_tokens, n_vocab].
        """
        return self._forward(tokens, core or {}, fill or {}, core_from)[0]

    def activations(self, tokens: Sequence[int]) -> list[Array]:
        """What enters ffn_down in the dense model: per layer, shape [n_tokens, n_ff]."""
        return self._forward(tokens, {}, {}, 0)[1]

    def _forward(
        self, tokens: Sequence[int], core: Core, fill: Fill, core_from: int
    ) -> tuple[NDArray[np.float32], list[Array]]:
        activations = []
        positions = np.arange(len(tokens))

        x = self.weight("token_embd")[np.asarray(tokens)]
        if self.arch == "gemma3":
            x = x * math.sqrt(self.n_embd)
        if self.has_positions:
            x = x + self.weight("position_embd")[positions]

        for i in range(self.n_layer):
            attention = self._attention(self.norm(x, f"blk.{i}.attn_norm"), positions, i)
            if self.arch == "gemma3":
                attention = self.norm(attention, f"blk.{i}.post_attention_norm")
            x = x + attention

            activation = self._activation(self.norm(x, f"blk.{i}.ffn_norm"), i)
            activations.append(activation)
            if i in core:
                left_out = np.ones(self.n_ff, dtype=bool)
                left_out[core[i]] = False
                activation = activation.copy()
                activation[core_from:, left_out] = fill[i][left_out] if i in fill else 0
            ffn = self.linear(activation, f"blk.{i}.ffn_down")
            if self.arch == "gemma3":
                ffn = self.norm(ffn, f"blk.{i}.post_ffw_norm")
            x = x + ffn

        x = self.norm(x, "output_norm")
        is_tied = "output.weight" not in self.tensors
        logits = self.linear(x, "token_embd" if is_tied else "output")
        return logits.astype(np.float32), activations

    def _attention(self, x: Array, positions: NDArray[np.integer[Any]], i: int) -> Array:
        """Causal attention of layer ``i``. x and the result: [n_tokens, n_embd]."""
        n_q, n_kv = self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        if f"blk.{i}.attn_qkv.weight" in self.tensors:
            qkv = self.linear(x, f"blk.{i}.attn_qkv")
            q, k, v = np.split(qkv, [n_q, n_q + n_kv], axis=-1)
        else:
            q, k, v = (self.linear(x, f"blk.{i}.attn_{name}") for name in "qkv")

        # [n_tokens, n_head, head_dim]
        q = q.reshape(len(x), self.n_head, self.head_dim)
        k = k.reshape(len(x), self.n_head_kv, self.head_dim)
        v = v.reshape(len(x), self.n_head_kv, self.head_dim)
        if self.arch in ("qwen3", "gemma3"):
            q = self.norm(q, f"blk.{i}.attn_q_norm")
            k = self.norm(k, f"blk.{i}.attn_k_norm")
        is_windowed = self._is_windowed(i)
        if not self.has_positions:
            base = self.rope_base_swa if is_windowed else self.rope_base
            q = self.rope(q, positions, base)
            k = self.rope(k, positions, base)

        # One key/value head serves n_head / n_head_kv query heads in a row.
        group = self.n_head // self.n_head_kv
        k = np.repeat(k, group, axis=1)
        v = np.repeat(v, group, axis=1)

        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(self.head_dim)
        distance = positions[:, None] - positions[None, :]
        hidden = distance < 0
        if is_windowed:
            hidden |= distance >= self.window
        scores[:, hidden] = -np.inf
        attended = np.einsum("hqk,khd->qhd", softmax(scores), v)
        return self.linear(attended.reshape(len(x), n_q), f"blk.{i}.attn_output")

    def _is_windowed(self, i: int) -> bool:
        """Whether gemma3's layer ``i`` sees only the last ``window`` tokens."""
        if not self.window:
            return False
        pattern = self.key("attention.sliding_window_pattern", 6)
        if isinstance(pattern, list):
            return bool(pattern[i])
        return i % int(pattern) < int(pattern) - 1

    def _activation(self, x: Array, i: int) -> Array:
        """The input of ffn_down of layer ``i``: [n_tokens, n_ff]."""
        up = self.linear(x, f"blk.{i}.ffn_up")
        if self.has_layer_norm:  # no gate
            return np.maximum(up, 0) if self.arch == "opt" else self.gelu(up)
        if self.arch == "phi3":  # one tensor, gate above up
            gate, up = np.split(up, 2, axis=-1)
            return silu(gate) * up
        gate = self.linear(x, f"blk.{i}.ffn_gate")
        return (self.gelu(gate) if self.arch == "gemma3" else self._of_llama(gate)) * up

    def _of_llama(self, x: Array) -> Array:
        """SiLU, or what the file names: ReLU, or one with a threshold t."""
        name = self.key("hidden_activation", "silu")
        t = float(self.key("hidden_activation_threshold", 0.0))
        if name == "silu":
            return silu(x)
        if name == "shiftrelu":
            return np.maximum(x - t, 0)
        return np.where(x > (t if name == "fatrelu" else 0), x, 0)

    def key(self, name: str, default: Any = None) -> Any:
        """The value of a key of this architecture."""
        field = self.fields.get(f"{self.arch}.{name}")
        if field is None:
            if default is None:
                raise ValueError(f"the file has no {self.arch}.{name}")
            return default
        return field.contents()

    def weight(self, name: str, suffix: str = "weight") -> Array:
        """A tensor, dequantised, rows before columns."""
        name = f"{name}.{suffix}"
        if name not in self.dequantized:
            tensor = self.tensors[name]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            self.dequantized[name] = values.astype(self.dtype)
        return self.dequantized[name]

    def linear(self, x: Array, name: str) -> Array:
        """``x @ weight.T``, plus the bias if the file has one."""
        y: Array = x @ self.weight(name).T
        if f"{name}.bias" in self.tensors:
            y = y + self.weight(name, "bias")
        return y

    def norm(self, x: Array, name: str) -> Array:
        """LayerNorm or RMS norm over the last axis."""
        if self.has_layer_norm:
            x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps)
        y: Array = x * self.weight(name)
        return y + self.weight(name, "bias") if self.has_layer_norm else y

    def rope(self, x: Array, positions: NDArray[np.integer[Any]], base: float) -> Array:
        """Rotate the first rope_dims of each head by position. x: [n_tokens, n_head, head_dim]."""
        half = self.rope_dims // 2
        frequencies = base ** (-np.arange(half, dtype=self.dtype) / half)
        if "rope_freqs.weight" in self.tensors:  # Llama 3's stretched frequencies
            frequencies = frequencies / self.weight("rope_freqs")
        angles = positions[:, None, None] * frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        # llama pairs neighbours (GGUF reorders its rows so), the others pair the two halves.
        if self.arch == "llama":
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        else:
            first, second = slice(0, half), slice(half, 2 * half)
        a, b = x[..., first], x[..., second]
        rotated: Array = x.copy()
        rotated[..., first] = a * cos - b * sin
        rotated[..., second] = a * sin + b * cos
        return rotated

    def gelu(self, x: Array) -> Array:
        """GELU in its tanh approximation, as ggml_gelu."""
        if not self.gelu_table:
            return gelu_tanh(x)
        inside = gelu_tanh(x.astype(np.float16).astype(np.float32)).astype(np.float16)
        return np.where(x <= -10, 0, np.where(x >= 10, x, inside.astype(self.dtype)))


def write_without_neurons(path: Path, out: Path, core: Core, fill: Fill | None = None) -> None:
    """Copy a model so that its dense graph computes what the core graph should.

    The ffn_down columns of the neurons left out are zeroed, and what ``fill`` would have brought
    through them is added to the ffn_down bias. llama.cpp then runs both graphs with the same
    kernels, which shows them equal more closely than any other implementation could. ffn_down, and
    its bias where there is a fill, must be F32.
    """
    shutil.copyfile(path, out)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out, "r+").tensors}
    for i, kept in core.items():
        down = tensors[f"blk.{i}.ffn_down.weight"]
        assert down.dtype == np.float32
        left_out = np.ones(down.shape[1], dtype=bool)
        left_out[kept] = False
        if fill is not None and i in fill:
            tensors[f"blk.{i}.ffn_down.bias"][:] += down[:, left_out] @ fill[i][left_out]
        down[:, left_out] = 0


def gelu_tanh(x: Array) -> Array:
    y: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)))
    return y


def silu(x: Array) -> Array:
    y: Array = x / (1 + np.exp(-x))
    return y


def softmax(x: Array) -> Array:
    """Over the last axis."""
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    y: Array = x / x.sum(axis=-1, keepdims=True)
    return y
