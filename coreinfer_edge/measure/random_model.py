"""Makes GGUF files with random weights that any llama.cpp loads and runs.

The tests need a model of every architecture, tensor type and odd width, and the benchmarks need
the shape of a 7B model without its download. The weights are scaled so that activations stay of
order one and logits spread by a few units, so the text is nonsense but greedy tokens differ.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import platformdirs
from gguf import GGMLQuantizationType as T
from gguf import LlamaFileType as F
from numpy.typing import NDArray

from coreinfer_edge.errors import ArgumentError


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. ``head_dim`` None means ``n_embd / n_head``."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    n_ctx: int = 512
    rope_freq_base: float = 10000.0
    head_dim: int | None = None
    n_expert: int = 4
    n_expert_used: int = 2
    tied: bool = False


SHAPES = {
    "tiny": Shape(4, 64, 160, 4, 2, 320),
    "small": Shape(4, 256, 768, 8, 4, 320),  # every row a multiple of 256, as the K types need
    "1b": Shape(16, 2048, 8192, 32, 8, 128256, 8192, 500000.0, tied=True),  # Llama 3.2 1B
    "3b": Shape(28, 3072, 8192, 24, 8, 128256, 8192, 500000.0, tied=True),  # Llama 3.2 3B
    "7b": Shape(32, 4096, 11008, 32, 32, 32000, 4096),  # Llama 2 7B
    "8b": Shape(32, 4096, 14336, 32, 8, 128256, 8192, 500000.0),  # Llama 3 8B
}
ARCHS = ("llama", "qwen3", "gemma3", "phi3", "gpt2", "opt", "starcoder2", "qwen3moe", "mamba")
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
    "q5_k": (T.Q5_K, F.MOSTLY_Q5_K_S),
    "q6_k": (T.Q6_K, F.MOSTLY_Q6_K),
    "iq4_nl": (T.IQ4_NL, F.MOSTLY_IQ4_NL),
}
# What llama.cpp's quantiser takes when a row is no multiple of the block (tensor_type_fallback).
FALLBACK = {T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0}

HAS_LAYER_NORM = ("gpt2", "opt", "starcoder2")  # LayerNorm and biases throughout, no gate
HAS_LEARNED_POSITIONS = ("gpt2", "opt")
HAS_QK_NORM = ("qwen3", "gemma3", "qwen3moe")
MAY_SET_HEAD_DIM = ("llama", "qwen3", "gemma3", "qwen3moe")
RELUS = ("relu", "fatrelu", "shiftrelu")  # of llama, in place of SiLU
RELU_THRESHOLD = 0.25  # of the last two

LOGIT_SPREAD = 3.0
# What a layer adds comes from its FFN more than from attention, which over a random past is nearly
# the same at every token, and would let greedy decoding settle on one.
ATTENTION_SHARE = 0.5
FFN_SHARE = 1.5
# Control tokens are nearly never generated, so that a test gets all the tokens it asked for.
CONTROL_TOKENS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
CONTROL_SCALE = 0.1
MERGES = ("t h", "th e", "Ġ t", "Ġt he", "i n", "a n", "an d", "e r", "o n", "Ġ a", "Ġ s", "r e")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MIN_VOCAB = len(CONTROL_TOKENS) + 256 + len(MERGES)


def make_random_gguf(
    path: str | os.PathLike[str],
    arch: str = "llama",
    *,
    type: str = "f32",
    shape: str = "tiny",
    n_layer: int | None = None,
    n_embd: int | None = None,
    n_ff: int | None = None,
    n_head: int | None = None,
    n_head_kv: int | None = None,
    n_vocab: int | None = None,
    n_ctx: int | None = None,
    head_dim: int | None = None,
    rope_freq_base: float | None = None,
    n_expert: int | None = None,
    n_expert_used: int | None = None,
    sliding_window: int = 16,
    sliding_window_pattern: int = 2,
    tied: bool | None = None,
    bias: bool | None = None,
    hidden_act: str | None = None,
    tensor_types: Mapping[str, str] | None = None,
    add_bos: bool = True,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Path:
    """Write a GGUF with random weights; the file appears under ``path`` only when it is whole.

    The same ``seed`` gives the same weights before quantisation whatever the type.

    Args:
        path: File to write.
        arch: One of ``ARCHS``.
        type: One of ``TYPES``, for all matrices with the token embedding and the output. Where a
            row is no multiple of its block, llama.cpp's own fallback type is used. Norms, biases,
            learned positions, expert routers and small state-space tensors stay F32.
        shape: One of ``SHAPES``; each size below that is not None replaces one of its sizes.
        n_layer: Layers.
        n_embd: Width of the residual stream.
        n_ff: FFN neurons per layer (per expert with ``qwen3moe``).
        n_head: Attention heads.
        n_head_kv: Key/value heads.
        n_vocab: Tokens, at least ``MIN_VOCAB``; those beyond it decode to `` w<id>``.
        n_ctx: Trained context length, and the learned positions of ``gpt2`` and ``opt``.
        head_dim: Size of a head; default ``n_embd / n_head``.
        rope_freq_base: Base of the rotary frequencies (of gemma3's full-attention layers).
        n_expert: Experts, and
        n_expert_used: experts per token, of ``qwen3moe``.
        sliding_window: Width of gemma3's window in tokens.
        sliding_window_pattern: Every how many layers gemma3 has a full-attention one.
        tied: Leave the output matrix out, so that llama.cpp uses the token embedding; by default
            only in the shapes 1b and 3b.
        bias: Biases on attention and FFN matrices: optional with ``llama`` (default without),
            always with ``gpt2``, ``opt`` and ``starcoder2``, never with the others.
        hidden_act: One of ``RELUS``, the activation of the gate of ``llama`` in place of SiLU.
        tensor_types: Other types for tensors whose name contains a key, e.g.
            ``{"ffn_down": "q6_k"}``.
        add_bos: Whether tokenising puts the bos token first.
        seed: Seed of the weights.
        advance: Called with the number of bytes written since the last call.

    Returns:
        ``path`` as a Path.

    Raises:
        ArgumentError: A name or size that no such model can have.
    """
    if shape not in SHAPES:
        raise ArgumentError(f"unknown shape {shape!r}: one of {', '.join(SHAPES)}")
    sizes = {
        key: value
        for key, value in {
            "n_layer": n_layer,
            "n_embd": n_embd,
            "n_ff": n_ff,
            "n_head": n_head,
            "n_head_kv": n_head_kv,
            "n_vocab": n_vocab,
            "n_ctx": n_ctx,
            "head_dim": head_dim,
            "rope_freq_base": rope_freq_base,
            "n_expert": n_expert,
            "n_expert_used": n_expert_used,
            "tied": tied,
        }.items()
        if value is not None
    }
    if arch in HAS_LEARNED_POSITIONS:
        sizes.setdefault("n_head_kv", sizes.get("n_head", SHAPES[shape].n_head))
    s = replace(SHAPES[shape], **sizes)  # type: ignore[arg-type]
    bias = arch in HAS_LAYER_NORM if bias is None else bias
    _check(arch, type, s, bias)
    if hidden_act is not None and (arch != "llama" or hidden_act not in RELUS):
        raise ArgumentError(
            f"hidden_act {hidden_act!r}: one of {', '.join(RELUS)}, and only of llama"
        )

    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, arch)
    _add_metadata(writer, arch, s, TYPES[type][1], sliding_window, sliding_window_pattern)
    if hidden_act is not None:
        writer.add_string(f"{arch}.hidden_activation", hidden_act)
        writer.add_float32(f"{arch}.hidden_activation_threshold", RELU_THRESHOLD)
    _add_tokenizer(writer, s.n_vocab, add_bos)

    weights = Weights(seed)
    specs = _tensors(arch, s, bias)
    if hidden_act is not None:
        specs.append(Spec("hidden_activation.marker", (1,), 0.0))
    specs = _typed(specs, type, tensor_types or {})
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
    return path


def cached_model(
    shape: str,
    type: str,
    folder: Path | None,
    progress: Callable[[int], AbstractContextManager[Callable[[int], None]]],
) -> Path:
    """A Llama with random weights out of a cache, made now if it is not there yet.

    Args:
        shape: One of ``SHAPES``.
        type: One of ``TYPES``.
        folder: The cache; None for the platform's.
        progress: Given the number of bytes to write, a context manager that yields what is told
            of those written. Not called for a model that is there.

    Raises:
        ArgumentError: No such shape or type, or the folder cannot be written to.
    """
    for value, values in ((shape, SHAPES), (type, TYPES)):
        if value not in values:
            raise ArgumentError(f"{value!r} must be one of {', '.join(values)}")
    folder = folder or platformdirs.user_cache_path("coreinfer-edge")
    path = folder / f"llama-{shape}-{type}.gguf"
    if path.exists():
        return path
    specs = _typed(_tensors("llama", SHAPES[shape], bias=False), type, {})
    n_bytes = sum(spec.n_bytes for spec in specs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < n_bytes:
            raise ArgumentError(
                f"{folder} has {free >> 20} MiB left, and the model takes {n_bytes >> 20}: name"
                " another folder with --cache"
            )
        with progress(n_bytes) as advance:
            return make_random_gguf(path, "llama", type=type, shape=shape, advance=advance)
    except OSError as error:
        raise ArgumentError(
            f"the model cannot be made in {folder} ({error.strerror or error}): name another folder"
            " with --cache"
        ) from error


def _check(arch: str, type: str, s: Shape, bias: bool) -> None:
    """Raise ArgumentError where llama.cpp would refuse the model or abort on it."""
    if arch not in ARCHS:
        raise ArgumentError(f"unknown architecture {arch!r}: one of {', '.join(ARCHS)}")
    if type not in TYPES:
        raise ArgumentError(f"unknown type {type!r}: one of {', '.join(TYPES)}")
    for name in ("n_layer", "n_embd", "n_ff", "n_head", "n_head_kv", "n_ctx", "head_dim"):
        if (size := getattr(s, name)) is not None and size < 1:
            raise ArgumentError(f"{name} {size} is below 1")
    if s.n_vocab < MIN_VOCAB:
        raise ArgumentError(
            f"n_vocab {s.n_vocab} is below the {MIN_VOCAB} that the tokenizer needs"
        )
    if bias and arch not in ("llama", *HAS_LAYER_NORM):
        raise ArgumentError(f"llama.cpp's {arch} has no biases on its FFN")
    if not bias and arch in HAS_LAYER_NORM:
        raise ArgumentError(f"llama.cpp's {arch} always has biases")
    if s.head_dim is not None and arch not in MAY_SET_HEAD_DIM:
        raise ArgumentError(f"llama.cpp's {arch} has heads of n_embd / n_head")
    if s.head_dim is None and s.n_embd % s.n_head:
        raise ArgumentError(f"n_embd {s.n_embd} is no multiple of n_head {s.n_head}")
    if s.n_head % s.n_head_kv:
        raise ArgumentError(f"n_head {s.n_head} is no multiple of n_head_kv {s.n_head_kv}")
    if (s.head_dim or s.n_embd // s.n_head) % 2:
        raise ArgumentError("rope needs an even head size")
    if not 0 < s.n_expert_used <= s.n_expert:
        raise ArgumentError(f"n_expert_used {s.n_expert_used} is not within 1 .. {s.n_expert}")


def _type_for_row(wanted: T, n_cols: int) -> T:
    """``wanted``, or what llama.cpp's quantiser takes instead for a row of ``n_cols`` weights."""
    for type in (wanted, FALLBACK.get(wanted, T.F16)):
        if n_cols % gguf.GGML_QUANT_SIZES[type][0] == 0:
            return type
    return T.F16


# --- metadata ------------------------------------------------------------------------------------


def _add_metadata(
    w: gguf.GGUFWriter, arch: str, s: Shape, file_type: F, window: int, pattern: int
) -> None:
    w.add_name("random weights")  # without the architecture: llama.cpp reads phi3 out of names
    w.add_file_type(file_type)
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_context_length(s.n_ctx)
    w.add_embedding_length(s.n_embd)
    w.add_block_count(s.n_layer)
    w.add_vocab_size(s.n_vocab)
    if arch in HAS_LAYER_NORM:
        w.add_layer_norm_eps(1e-5)
    else:
        w.add_layer_norm_rms_eps(1e-6 if arch in ("qwen3", "qwen3moe", "gemma3") else 1e-5)
    if arch == "mamba":
        w.add_feed_forward_length(0)
        w.add_head_count(0)
        w.add_ssm_conv_kernel(4)
        w.add_ssm_inner_size(2 * s.n_embd)
        w.add_ssm_state_size(16)
        w.add_ssm_time_step_rank(_dt_rank(s))
        return
    w.add_feed_forward_length(s.n_ff)
    w.add_head_count(s.n_head)
    w.add_head_count_kv(s.n_head_kv)
    head_dim = s.head_dim or s.n_embd // s.n_head
    if arch in MAY_SET_HEAD_DIM:
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
    if arch not in HAS_LEARNED_POSITIONS:
        w.add_rope_dimension_count(head_dim)
        w.add_rope_freq_base(s.rope_freq_base * (100 if arch == "gemma3" else 1))
    if arch == "gemma3":  # its windowed layers rotate with a base of their own
        w.add_rope_freq_base_swa(s.rope_freq_base)
        w.add_sliding_window(window)
        w.add_sliding_window_pattern(pattern)
    if arch == "qwen3moe":
        w.add_expert_count(s.n_expert)
        w.add_expert_used_count(s.n_expert_used)
        w.add_expert_feed_forward_length(s.n_ff)


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

    ``kind`` is "matrix" (takes the file's type) or, in F32, "plain", "signed" (random signs) or
    "ssm_a". The values are ``mean + std * normal``. The rows of control tokens are scaled down
    where ``is_vocab``.
    """

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    kind: str = "plain"
    is_vocab: bool = False
    type: T = T.F32

    @property
    def n_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size


def _dt_rank(s: Shape) -> int:
    return -(-s.n_embd // 16)


def _tensors(arch: str, s: Shape, bias: bool) -> list[Spec]:
    """All tensors of a model, in the order of the computation."""
    specs: list[Spec] = []

    def matrix(name: str, *shape: int, scale: float = 1.0, is_vocab: bool = False) -> None:
        std = scale / math.sqrt(shape[-1])
        specs.append(Spec(f"{name}.weight", shape, std, kind="matrix", is_vocab=is_vocab))

    def norm(name: str, size: int, mean: float = 1.0) -> None:
        specs.append(Spec(f"{name}.weight", (size,), 0.1 * mean, mean))
        if arch in HAS_LAYER_NORM:
            specs.append(Spec(f"{name}.bias", (size,), 0.1))

    def biases(name: str, size: int) -> None:
        if bias:
            specs.append(Spec(f"{name}.bias", (size,), 0.1))

    head_dim = s.head_dim or s.n_embd // s.n_head
    q, kv = head_dim * s.n_head, head_dim * s.n_head_kv

    # Token embeddings enter the residual stream with an rms of 1; gemma3 multiplies them itself.
    embedding_scale = 1.0 if arch == "gemma3" else math.sqrt(s.n_embd)
    matrix("token_embd", s.n_vocab, s.n_embd, scale=embedding_scale, is_vocab=True)
    if arch in HAS_LEARNED_POSITIONS:
        specs.append(Spec("position_embd.weight", (s.n_ctx, s.n_embd), 0.5))

    for i in range(s.n_layer):
        b = f"blk.{i}"
        norm(f"{b}.attn_norm", s.n_embd)
        if arch == "mamba":
            _mamba_layer(specs, b, s)
            continue

        if arch in ("gpt2", "phi3"):
            matrix(f"{b}.attn_qkv", q + 2 * kv, s.n_embd)
            biases(f"{b}.attn_qkv", q + 2 * kv)
        else:
            for name, size in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
                matrix(f"{b}.{name}", size, s.n_embd)
                biases(f"{b}.{name}", size)
        if arch in HAS_QK_NORM:
            norm(f"{b}.attn_q_norm", head_dim)
            norm(f"{b}.attn_k_norm", head_dim)
        matrix(f"{b}.attn_output", s.n_embd, q, scale=ATTENTION_SHARE)
        biases(f"{b}.attn_output", s.n_embd)
        if arch == "gemma3":
            norm(f"{b}.post_attention_norm", s.n_embd, ATTENTION_SHARE)

        norm(f"{b}.ffn_norm", s.n_embd)
        if arch == "qwen3moe":
            router = (s.n_expert, s.n_embd)
            specs.append(Spec(f"{b}.ffn_gate_inp.weight", router, 1 / math.sqrt(s.n_embd)))
            matrix(f"{b}.ffn_gate_exps", s.n_expert, s.n_ff, s.n_embd)
            matrix(f"{b}.ffn_up_exps", s.n_expert, s.n_ff, s.n_embd)
            matrix(f"{b}.ffn_down_exps", s.n_expert, s.n_embd, s.n_ff)
            continue
        if arch in ("llama", "qwen3", "gemma3"):
            matrix(f"{b}.ffn_gate", s.n_ff, s.n_embd)
            biases(f"{b}.ffn_gate", s.n_ff)
        matrix(f"{b}.ffn_up", 2 * s.n_ff if arch == "phi3" else s.n_ff, s.n_embd)
        biases(f"{b}.ffn_up", s.n_ff)
        matrix(f"{b}.ffn_down", s.n_embd, s.n_ff, scale=FFN_SHARE)
        biases(f"{b}.ffn_down", s.n_embd)
        if arch == "gemma3":
            norm(f"{b}.post_ffw_norm", s.n_embd)

    if s.tied:
        # Random signs, or the last token would be its own likeliest successor for ever.
        mean = LOGIT_SPREAD / embedding_scale
        specs.append(Spec("output_norm.weight", (s.n_embd,), 0.1 * mean, mean, kind="signed"))
        if arch in HAS_LAYER_NORM:
            specs.append(Spec("output_norm.bias", (s.n_embd,), 0.1 * mean))
    else:
        norm("output_norm", s.n_embd, LOGIT_SPREAD)
        matrix("output", s.n_vocab, s.n_embd, is_vocab=True)
    return specs


def _typed(specs: Iterable[Spec], type: str, tensor_types: Mapping[str, str]) -> list[Spec]:
    """The tensors with the types that they are to have in the file."""
    result = []
    for spec in specs:
        wanted = TYPES[type][0] if spec.kind == "matrix" else T.F32
        for part, name in tensor_types.items():
            if part in spec.name and spec.kind == "matrix":
                wanted = TYPES[name][0]
        result.append(replace(spec, type=_type_for_row(wanted, spec.shape[-1])))
    return result


def _mamba_layer(specs: list[Spec], b: str, s: Shape) -> None:
    inner, state, rank = 2 * s.n_embd, 16, _dt_rank(s)
    specs += [
        Spec(f"{b}.ssm_in.weight", (2 * inner, s.n_embd), 1 / math.sqrt(s.n_embd), kind="matrix"),
        Spec(f"{b}.ssm_conv1d.weight", (inner, 4), 0.5),
        Spec(f"{b}.ssm_conv1d.bias", (inner,), 0.1),
        Spec(f"{b}.ssm_x.weight", (rank + 2 * state, inner), inner**-0.5, kind="matrix"),
        Spec(f"{b}.ssm_dt.weight", (inner, rank), rank**-0.5),
        Spec(f"{b}.ssm_dt.bias", (inner,), 0.5, -2.0),
        Spec(f"{b}.ssm_a", (inner, state), 0.0, kind="ssm_a"),
        Spec(f"{b}.ssm_d", (inner,), 0.1, 1.0),
        Spec(f"{b}.ssm_out.weight", (s.n_embd, inner), inner**-0.5, kind="matrix"),
    ]


# --- weights -------------------------------------------------------------------------------------

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class Weights:
    """Draws and quantises the weights of one file.

    A small tensor has weights of its own. A large one is cut from a pool of quantised blocks that
    is drawn once per type and spread and read round and round, which makes a 7B file in minutes.
    The number of blocks in a pool has no factor in common with the blocks of a row, so rows differ
    however often the pool has come round.
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
            yield _encode(self._draw(rng, spec), spec.type)
            return

        n_cols = spec.shape[-1]
        left = spec.n_bytes
        if spec.is_vocab:
            n_control = len(CONTROL_TOKENS)
            control = replace(spec, shape=(n_control, n_cols))
            yield _encode(self._draw(rng, control), spec.type)
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
                pieces.append(_encode(values, type))
            self.pools[key] = np.concatenate(pieces)
        return self.pools[key]


def _encode(values: Floats, type: T) -> Bytes:
    """``values`` as the bytes of ``type``, rows along the last axis."""
    if type == T.F32:
        return np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    if type == T.F16:
        return values.astype(np.float16).view(np.uint8).reshape(-1)
    if type == T.BF16:
        return gguf.quants.quantize(values, type).reshape(-1)

    from coreinfer_edge.binding.load import load_library  # ggml has all types, gguf-py only some

    quantize = load_library("ggml-base").ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    rows = np.ascontiguousarray(values).reshape(-1, values.shape[-1])
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]
    encoded = np.empty(rows.size // block * block_bytes, dtype=np.uint8)
    n = quantize(type, rows.ctypes.data, encoded.ctypes.data, 0, rows.shape[0], rows.shape[1], None)
    assert n == encoded.size
    return encoded
