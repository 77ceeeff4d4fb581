"""Makes GGUF files with random weights in the shape of a Llama, for ``bench --shape``.

So a benchmark has the shape of a 7B model without a download. The weights are scaled so that
activations stay of order one and logits spread by a few units. The text is nonsense, but greedy
tokens differ.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import platformdirs
from gguf import GGMLQuantizationType as T
from gguf import LlamaFileType as F
from numpy.typing import NDArray

from coreinfer_edge.binding.load import load_library
from coreinfer_edge.errors import ArgumentError


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes:
        n_layer: layers.
        n_embd: width of the residual stream.
        n_ff: FFN neurons per layer.
        n_head: attention heads.
        n_head_kv: key/value heads.
        n_vocab: tokens, at least ``MIN_VOCAB``; those beyond it decode to `` w<id>``.
        n_ctx: trained context length.
        rope_freq_base: base of the rotary frequencies.
        tied: no output matrix, so that llama.cpp uses the token embedding.
    """

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    n_ctx: int = 512
    rope_freq_base: float = 10000.0
    tied: bool = False


SHAPES = {
    "tiny": Shape(4, 64, 160, 4, 2, 320),
    "small": Shape(4, 256, 768, 8, 4, 320),  # every row a multiple of 256, as the K types need
    "1b": Shape(16, 2048, 8192, 32, 8, 128256, 8192, 500000.0, tied=True),  # Llama 3.2 1B
    "3b": Shape(28, 3072, 8192, 24, 8, 128256, 8192, 500000.0, tied=True),  # Llama 3.2 3B
    "7b": Shape(32, 4096, 11008, 32, 32, 32000, 4096),  # Llama 2 7B
    "8b": Shape(32, 4096, 14336, 32, 8, 128256, 8192, 500000.0),  # Llama 3 8B
}
TYPES: dict[str, tuple[T, F]] = {
    "f32": (T.F32, F.ALL_F32),
    "f16": (T.F16, F.MOSTLY_F16),
    "bf16": (T.BF16, F.MOSTLY_BF16),
    "q8_0": (T.Q8_0, F.MOSTLY_Q8_0),
    "q4_0": (T.Q4_0, F.MOSTLY_Q4_0),
    "q4_1": (T.Q4_1, F.MOSTLY_Q4_1),
    "q5_0": (T.Q5_0, F.MOSTLY_Q5_0),
    "q5_1": (T.Q5_1, F.MOSTLY_Q5_1),
    "q4_k": (T.Q4_K, F.MOSTLY_Q4_K_S),
    "q4_k_m": (T.Q4_K, F.MOSTLY_Q4_K_M),  # and Q6_K, see ``has_more_bits``
    "q5_k": (T.Q5_K, F.MOSTLY_Q5_K_S),
    "q6_k": (T.Q6_K, F.MOSTLY_Q6_K),
    "iq4_nl": (T.IQ4_NL, F.MOSTLY_IQ4_NL),
}
# The types of llama.cpp's quantiser for rows that are no multiple of the block
# (tensor_type_fallback).
FALLBACK = {T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0}

LOGIT_SPREAD = 3.0
# A layer's FFN contributes more than its attention. Attention over a random past is nearly the same
# at every token, and greedy decoding would settle on one token.
ATTENTION_SHARE = 0.5
FFN_SHARE = 1.5
# Control tokens are hardly ever generated, so that an answer has all the tokens asked for.
CONTROL_TOKENS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
CONTROL_SCALE = 0.1
MERGES = ("t h", "th e", "Ġ t", "Ġt he", "i n", "a n", "an d", "e r", "o n", "Ġ a", "Ġ s", "r e")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MIN_VOCAB = len(CONTROL_TOKENS) + 256 + len(MERGES)


def cached_model(
    shape: str,
    type: str,
    folder: Path | None,
    progress: Callable[[int], AbstractContextManager[Callable[[int], None]]],
) -> Path:
    """A Llama with random weights from a cache, made now if the cache does not have it.

    Args:
        shape: one of ``SHAPES``.
        type: one of ``TYPES``.
        folder: the cache; None for the platform's.
        progress: given the number of bytes to write, a context manager that yields a function,
            which is called with the number of bytes written. Not used for a model in the cache.

    Raises:
        ArgumentError: no such shape or type, or the folder cannot be written to.
    """
    for value, values in ((shape, SHAPES), (type, TYPES)):
        if value not in values:
            raise ArgumentError(f"{value!r} must be one of {', '.join(values)}")
    folder = folder or platformdirs.user_cache_path("coreinfer-edge")
    path = folder / f"llama-{shape}-{type}.gguf"
    if path.exists():
        return path
    sizes = SHAPES[shape]
    specs = typed_tensors(sizes, type)
    n_bytes = sum(spec.n_bytes for spec in specs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < n_bytes:
            raise ArgumentError(
                f"{folder} has {free >> 20} MiB left, and the model takes {n_bytes >> 20}: name"
                " another folder with --cache"
            )
        with progress(n_bytes) as advance:
            writer = new_writer(path, "llama", sizes, type)
            add_metadata(writer, sizes)
            write(writer, path, specs, advance=advance)
    except OSError as error:
        raise ArgumentError(
            f"the model cannot be made in {folder} ({error.strerror or error}): name another folder"
            " with --cache"
        ) from error
    return path


# --- metadata ------------------------------------------------------------------------------------


def new_writer(path: Path, arch: str, s: Shape, type: str, add_bos: bool = True) -> gguf.GGUFWriter:
    """A writer that has the metadata which every architecture has, and the tokenizer."""
    w = gguf.GGUFWriter(path.with_name(f".{path.name}.{os.getpid()}.partial"), arch)
    w.add_name("random weights")  # without the architecture: llama.cpp reads phi3 out of names
    w.add_file_type(TYPES[type][1])
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_context_length(s.n_ctx)
    w.add_embedding_length(s.n_embd)
    w.add_block_count(s.n_layer)
    w.add_vocab_size(s.n_vocab)
    _add_tokenizer(w, s.n_vocab, add_bos)
    return w


def add_metadata(w: gguf.GGUFWriter, s: Shape) -> None:
    w.add_layer_norm_rms_eps(1e-5)
    w.add_feed_forward_length(s.n_ff)
    w.add_head_count(s.n_head)
    w.add_head_count_kv(s.n_head_kv)
    w.add_rope_dimension_count(s.n_embd // s.n_head)
    w.add_rope_freq_base(s.rope_freq_base)


def byte_characters() -> list[str]:
    """The 256 characters by which a GPT-2 vocabulary spells bytes (GPT-2's bytes_to_unicode)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _add_tokenizer(w: gguf.GGUFWriter, n_vocab: int, add_bos: bool) -> None:
    """A GPT-2 vocabulary of control tokens, all bytes, a few merges and fillers."""
    tokens = [*CONTROL_TOKENS, *byte_characters(), *(m.replace(" ", "") for m in MERGES)]
    tokens += [f"Ġw{i}" for i in range(len(tokens), n_vocab)]
    n_control = len(CONTROL_TOKENS)
    types = [gguf.TokenType.CONTROL] * n_control + [gguf.TokenType.NORMAL] * (n_vocab - n_control)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types(types)
    w.add_token_merges(list(MERGES))
    w.add_bos_token_id(tokens.index("<|bos|>"))
    w.add_eos_token_id(tokens.index("<|eos|>"))
    w.add_eot_token_id(tokens.index("<|im_end|>"))
    w.add_add_bos_token(add_bos)
    w.add_chat_template(CHAT_TEMPLATE)


# --- tensors -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """One tensor to write, of numpy shape ``shape`` (rows before columns).

    ``kind`` is "matrix" (has the file's type) or, in F32, "plain", "signed" (random signs) or
    "ssm_a". The values are ``mean + std * normal``. If ``is_vocab``, the rows of control tokens are
    scaled down.
    """

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    kind: str = "plain"
    is_vocab: bool = False
    type: T = T.F32

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return self.n_elements // block * size

    def of_type(self, name: str) -> Spec:
        """The tensor in a file of type ``name``: a matrix has that type, others stay F32.

        If a row is no multiple of the type's block, the type is llama.cpp's own fallback.
        """
        wanted = TYPES[name][0] if self.kind == "matrix" else T.F32
        for type in (wanted, FALLBACK.get(wanted, T.F16)):
            if self.shape[-1] % gguf.GGML_QUANT_SIZES[type][0] == 0:
                return replace(self, type=type)
        return replace(self, type=T.F16)


def matrix(name: str, *shape: int, scale: float = 1.0, is_vocab: bool = False) -> Spec:
    std = scale / math.sqrt(shape[-1])
    return Spec(f"{name}.weight", shape, std, kind="matrix", is_vocab=is_vocab)


def norm(name: str, size: int, mean: float = 1.0) -> Spec:
    return Spec(f"{name}.weight", (size,), 0.1 * mean, mean)


def embedding(s: Shape, scale: float) -> Spec:
    return matrix("token_embd", s.n_vocab, s.n_embd, scale=scale, is_vocab=True)


def output(s: Shape, embedding_scale: float) -> list[Spec]:
    """The last norm, and the output matrix of a model that is not tied."""
    if s.tied:
        # Random signs, or the last token would be its own likeliest successor for ever.
        last = norm("output_norm", s.n_embd, LOGIT_SPREAD / embedding_scale)
        return [replace(last, kind="signed")]
    return [
        norm("output_norm", s.n_embd, LOGIT_SPREAD),
        matrix("output", s.n_vocab, s.n_embd, is_vocab=True),
    ]


def _tensors(s: Shape) -> list[Spec]:
    """All tensors of a Llama, in the order of the computation."""
    kv = s.n_embd // s.n_head * s.n_head_kv
    scale = math.sqrt(s.n_embd)  # token embeddings enter the residual stream with an rms of 1
    specs = [embedding(s, scale)]
    for b in (f"blk.{i}" for i in range(s.n_layer)):
        specs += [
            norm(f"{b}.attn_norm", s.n_embd),
            matrix(f"{b}.attn_q", s.n_embd, s.n_embd),
            matrix(f"{b}.attn_k", kv, s.n_embd),
            matrix(f"{b}.attn_v", kv, s.n_embd),
            matrix(f"{b}.attn_output", s.n_embd, s.n_embd, scale=ATTENTION_SHARE),
            norm(f"{b}.ffn_norm", s.n_embd),
            matrix(f"{b}.ffn_gate", s.n_ff, s.n_embd),
            matrix(f"{b}.ffn_up", s.n_ff, s.n_embd),
            matrix(f"{b}.ffn_down", s.n_embd, s.n_ff, scale=FFN_SHARE),
        ]
    return specs + output(s, scale)


def typed_tensors(s: Shape, type: str) -> list[Spec]:
    """All tensors of a Llama, as a file of this type has them."""
    return [
        spec.of_type("q6_k" if type == "q4_k_m" and has_more_bits(spec.name, s) else type)
        for spec in _tensors(s)
    ]


def has_more_bits(name: str, s: Shape) -> bool:
    """Whether Q4_K_M keeps this tensor in Q6_K, as llama.cpp's quantiser does.

    That is the output matrix, and the values and ffn_down of half of the layers (use_more_bits in
    llama-quant.cpp).
    """
    if name == ("token_embd.weight" if s.tied else "output.weight"):
        return True
    if not name.endswith((".attn_v.weight", ".ffn_down.weight")):
        return False
    layer, n = int(name.split(".")[1]), s.n_layer
    return layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2


# --- weights -------------------------------------------------------------------------------------

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def write(
    writer: gguf.GGUFWriter,
    path: Path,
    specs: Sequence[Spec],
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    weights: Weights | None = None,
) -> None:
    """Draw the weights and write the file; it appears under ``path`` only when it is whole.

    Args:
        writer: one of ``new_writer``, with all metadata.
        path: the file.
        specs: its tensors, with their types.
        seed: of the weights; the same one gives the same weights before quantisation.
        advance: told the number of bytes written since the last call.
        weights: draws them, in place of ``Weights(seed)``.
    """
    assert writer.path is not None
    partial, weights = writer.path, weights or Weights(seed)
    for spec in specs:
        writer.add_tensor_info(
            spec.name, spec.shape, np.dtype(np.float32), spec.n_bytes, raw_dtype=spec.type
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        for spec in specs:
            writer.write_padding(file, file.tell())
            for chunk in weights.chunks(spec):
                chunk.tofile(file)
                if advance:
                    advance(chunk.size)
            writer.write_padding(file, spec.n_bytes)
        writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class Weights:
    """Draws and quantises the weights of one file.

    A small tensor has its own weights. A large one is cut from a pool of quantised blocks, so that
    a 7B file takes minutes. A pool is drawn once per type and spread, and read again and again. The
    number of its blocks has no factor in common with the blocks of a row, so all rows differ.
    """

    SMALL = 1 << 20  # weights
    POOL = 1 << 24  # weights; twice as many for K types, whose few blocks per row repeat sooner

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.pools: dict[tuple[T, float, int], Bytes] = {}

    def chunks(self, spec: Spec) -> Iterator[Bytes]:
        """The bytes of a tensor, in pieces."""
        rng = np.random.default_rng([self.seed, zlib.crc32(spec.name.encode())])
        if math.prod(spec.shape) <= self.SMALL or spec.kind != "matrix":
            yield encode(self._draw(rng, spec), spec.type)
            return

        n_cols = spec.shape[-1]
        left = spec.n_bytes
        if spec.is_vocab:
            n_control = len(CONTROL_TOKENS)
            control = replace(spec, shape=(n_control, n_cols))
            yield encode(self._draw(rng, control), spec.type)
            left -= control.n_bytes
        block, block_bytes = gguf.GGML_QUANT_SIZES[spec.type]
        pool = self._pool(spec.type, spec.std, n_cols // block)
        start = int(rng.integers(pool.size // block_bytes)) * block_bytes
        while left:
            piece = pool[start : start + left]
            yield piece
            left -= piece.size
            start = 0

    def _draw(self, rng: np.random.Generator, spec: Spec) -> Floats:
        if spec.kind == "ssm_a":  # S4D-real, as Mamba starts: each channel decays at 1 .. d_state
            return -np.broadcast_to(np.arange(1, spec.shape[1] + 1, dtype=np.float32), spec.shape)
        values = rng.standard_normal(spec.shape, dtype=np.float32)
        values *= np.float32(spec.std)
        values += np.float32(spec.mean)
        if spec.kind == "signed":
            values *= rng.choice(np.array([-1, 1], dtype=np.float32), size=spec.shape)
        if spec.is_vocab:
            values[: len(CONTROL_TOKENS)] *= np.float32(CONTROL_SCALE)
        return values

    def _pool(self, type: T, std: float, blocks_per_row: int) -> Bytes:
        key = (type, std, blocks_per_row)
        if key not in self.pools:
            block = gguf.GGML_QUANT_SIZES[type][0]
            n_blocks = (self.POOL << (block == 256)) // block
            while math.gcd(n_blocks, blocks_per_row) > 1:
                n_blocks += 1
            rng = np.random.default_rng([self.seed, len(self.pools)])
            pieces = []
            for first in range(0, n_blocks, 1 << 16):  # bounds the F32 values held at a time
                n = min(1 << 16, n_blocks - first)
                values = rng.standard_normal((n, block), dtype=np.float32)
                values *= np.float32(std)
                pieces.append(encode(values, type))
            self.pools[key] = np.concatenate(pieces)
        return self.pools[key]


def encode(values: Floats, type: T) -> Bytes:
    """``values`` as the bytes of ``type``, rows along the last axis."""
    if type == T.F32:
        return np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    if type == T.F16:
        return values.astype(np.float16).view(np.uint8).reshape(-1)
    if type == T.BF16:
        return gguf.quants.quantize(values, type).reshape(-1)
    quantize = load_library("ggml-base").ggml_quantize_chunk  # gguf-py has only some types
    quantize.restype = ctypes.c_size_t
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
    rows = np.ascontiguousarray(values).reshape(-1, values.shape[-1])
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]
    encoded = np.empty(rows.size // block * block_bytes, dtype=np.uint8)
    n = quantize(type, rows.ctypes.data, encoded.ctypes.data, 0, rows.shape[0], rows.shape[1], None)
    assert n == encoded.size
    return encoded
