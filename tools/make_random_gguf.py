"""Makes GGUF files with random weights of many architectures, that any llama.cpp loads and runs.

The tests need a model of every architecture, tensor type and odd width. ``bench --shape`` has the
Llamas among them (coreinfer_edge/measure/random_llama.py).

python tools/make_random_gguf.py out.gguf --arch llama --type q4_k --shape small
python tools/make_random_gguf.py 1b.gguf --shape 1b --type q4_0
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf

# As a script beside a built source tree; an installed coreinfer_edge goes first.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.measure.random_llama import (
    ATTENTION_SHARE,
    FFN_SHARE,
    MIN_VOCAB,
    SHAPES,
    TYPES,
    Shape,
    Spec,
    embedding,
    matrix,
    new_writer,
    norm,
    output,
    write,
)

ARCHS = ("llama", "qwen3", "gemma3", "phi3", "gpt2", "opt", "starcoder2", "qwen3moe", "mamba")
HAS_LAYER_NORM = ("gpt2", "opt", "starcoder2")  # LayerNorm and biases throughout, no gate
HAS_LEARNED_POSITIONS = ("gpt2", "opt")
HAS_QK_NORM = ("qwen3", "gemma3", "qwen3moe")
MAY_SET_HEAD_DIM = ("llama", "qwen3", "gemma3", "qwen3moe")
RELUS = ("relu", "fatrelu", "shiftrelu")  # of llama, in place of SiLU
RELU_THRESHOLD = 0.25  # of the last two


@dataclass(frozen=True)
class Sizes(Shape):
    """The sizes of a model of any architecture.

    Attributes:
        head_dim: size of a head; None for ``n_embd / n_head``.
        n_expert: experts of ``qwen3moe``, each with ``n_ff`` neurons.
        n_expert_used: experts per token.
        sliding_window: width of gemma3's window in tokens.
        sliding_window_pattern: every how many layers gemma3 has a full-attention one.
    """

    head_dim: int | None = None
    n_expert: int = 4
    n_expert_used: int = 2
    sliding_window: int = 16
    sliding_window_pattern: int = 2


def make_random_gguf(
    path: str | os.PathLike[str],
    arch: str = "llama",
    *,
    type: str = "f32",
    shape: str = "tiny",
    bias: bool | None = None,
    hidden_act: str | None = None,
    tensor_types: Mapping[str, str] | None = None,
    add_bos: bool = True,
    seed: int = 0,
    **sizes: Any,
) -> Path:
    """Write a GGUF with random weights; the file appears under ``path`` only when it is whole.

    The same ``seed`` gives the same weights before quantisation whatever the type.

    Args:
        path: file to write.
        arch: one of ``ARCHS``.
        type: one of ``TYPES``, for all matrices with the token embedding and the output. Norms,
            biases, learned positions, expert routers and small state-space tensors stay F32.
        shape: one of ``SHAPES``.
        bias: biases on attention and FFN matrices: optional with ``llama`` (default without),
            always with ``gpt2``, ``opt`` and ``starcoder2``, never with the others.
        hidden_act: one of ``RELUS``, the activation of the gate of ``llama`` in place of SiLU.
        tensor_types: other types for tensors whose name contains a key, e.g.
            ``{"ffn_down": "q6_k"}``.
        add_bos: whether tokenising puts the bos token first.
        seed: seed of the weights.
        **sizes: attributes of ``Sizes``, in place of the shape's.

    Returns:
        ``path`` as a Path.

    Raises:
        ArgumentError: a name or size that no such model can have.
    """
    if shape not in SHAPES:
        raise ArgumentError(f"unknown shape {shape!r}: one of {', '.join(SHAPES)}")
    s = Sizes(**{**vars(SHAPES[shape]), **sizes})
    if arch in HAS_LEARNED_POSITIONS and "n_head_kv" not in sizes:
        s = replace(s, n_head_kv=s.n_head)
    bias = arch in HAS_LAYER_NORM if bias is None else bias
    _check(arch, type, s, bias)
    if hidden_act is not None and (arch != "llama" or hidden_act not in RELUS):
        raise ArgumentError(
            f"hidden_act {hidden_act!r}: one of {', '.join(RELUS)}, and only of llama"
        )
    path = Path(path)
    writer = new_writer(path, arch, s, type, add_bos)
    _add_metadata(writer, arch, s)
    specs = _tensors(arch, s, bias)
    if hidden_act is not None:
        writer.add_string(f"{arch}.hidden_activation", hidden_act)
        writer.add_float32(f"{arch}.hidden_activation_threshold", RELU_THRESHOLD)
        specs.append(Spec("hidden_activation.marker", (1,), 0.0))
    other = tensor_types or {}
    types = [next((other[part] for part in other if part in spec.name), type) for spec in specs]
    write(writer, path, [s.of_type(t) for s, t in zip(specs, types, strict=True)], seed)
    return path


def _check(arch: str, type: str, s: Sizes, bias: bool) -> None:
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


def _add_metadata(w: gguf.GGUFWriter, arch: str, s: Sizes) -> None:
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
        w.add_sliding_window(s.sliding_window)
        w.add_sliding_window_pattern(s.sliding_window_pattern)
    if arch == "qwen3moe":
        w.add_expert_count(s.n_expert)
        w.add_expert_used_count(s.n_expert_used)
        w.add_expert_feed_forward_length(s.n_ff)


def _dt_rank(s: Sizes) -> int:
    return -(-s.n_embd // 16)


def _tensors(arch: str, s: Sizes, bias: bool) -> list[Spec]:
    """All tensors of a model, in the order of the computation."""
    # Token embeddings enter the residual stream with an rms of 1; gemma3 multiplies them itself.
    embedding_scale = 1.0 if arch == "gemma3" else math.sqrt(s.n_embd)
    specs = [embedding(s, embedding_scale)]

    def add_norm(name: str, size: int, mean: float = 1.0) -> None:
        specs.append(norm(name, size, mean))
        if arch in HAS_LAYER_NORM:
            specs.append(Spec(f"{name}.bias", (size,), 0.1))

    def add(name: str, *shape: int, scale: float = 1.0) -> None:
        specs.append(matrix(name, *shape, scale=scale))

    def biases(name: str, size: int) -> None:
        if bias:
            specs.append(Spec(f"{name}.bias", (size,), 0.1))

    head_dim = s.head_dim or s.n_embd // s.n_head
    q, kv = head_dim * s.n_head, head_dim * s.n_head_kv

    if arch in HAS_LEARNED_POSITIONS:
        specs.append(Spec("position_embd.weight", (s.n_ctx, s.n_embd), 0.5))

    for i in range(s.n_layer):
        b = f"blk.{i}"
        add_norm(f"{b}.attn_norm", s.n_embd)
        if arch == "mamba":
            _mamba_layer(specs, b, s)
            continue

        if arch in ("gpt2", "phi3"):
            add(f"{b}.attn_qkv", q + 2 * kv, s.n_embd)
            biases(f"{b}.attn_qkv", q + 2 * kv)
        else:
            for name, size in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
                add(f"{b}.{name}", size, s.n_embd)
                biases(f"{b}.{name}", size)
        if arch in HAS_QK_NORM:
            add_norm(f"{b}.attn_q_norm", head_dim)
            add_norm(f"{b}.attn_k_norm", head_dim)
        add(f"{b}.attn_output", s.n_embd, q, scale=ATTENTION_SHARE)
        biases(f"{b}.attn_output", s.n_embd)
        if arch == "gemma3":
            add_norm(f"{b}.post_attention_norm", s.n_embd, ATTENTION_SHARE)

        add_norm(f"{b}.ffn_norm", s.n_embd)
        if arch == "qwen3moe":
            router = (s.n_expert, s.n_embd)
            specs.append(Spec(f"{b}.ffn_gate_inp.weight", router, 1 / math.sqrt(s.n_embd)))
            add(f"{b}.ffn_gate_exps", s.n_expert, s.n_ff, s.n_embd)
            add(f"{b}.ffn_up_exps", s.n_expert, s.n_ff, s.n_embd)
            add(f"{b}.ffn_down_exps", s.n_expert, s.n_embd, s.n_ff)
            continue
        if arch in ("llama", "qwen3", "gemma3"):
            add(f"{b}.ffn_gate", s.n_ff, s.n_embd)
            biases(f"{b}.ffn_gate", s.n_ff)
        add(f"{b}.ffn_up", 2 * s.n_ff if arch == "phi3" else s.n_ff, s.n_embd)
        biases(f"{b}.ffn_up", s.n_ff)
        add(f"{b}.ffn_down", s.n_embd, s.n_ff, scale=FFN_SHARE)
        biases(f"{b}.ffn_down", s.n_embd)
        if arch == "gemma3":
            add_norm(f"{b}.post_ffw_norm", s.n_embd)

    last_norm, *matrices = output(s, embedding_scale)
    specs.append(last_norm)
    if arch in HAS_LAYER_NORM:
        specs.append(Spec("output_norm.bias", (s.n_embd,), last_norm.std if s.tied else 0.1))
    return specs + matrices


def _mamba_layer(specs: list[Spec], b: str, s: Sizes) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="GGUF file to write")
    parser.add_argument("--arch", choices=ARCHS, default="llama")
    parser.add_argument("--type", choices=TYPES, default="f32", help="type of all matrices")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    for name in ("n-layer", "n-embd", "n-ff", "n-head", "n-head-kv", "n-vocab", "n-ctx"):
        parser.add_argument(f"--{name}", type=int, help="instead of the shape's")
    parser.add_argument("--head-dim", type=int, help="default: n_embd / n_head")
    parser.add_argument(
        "--tied",
        action=argparse.BooleanOptionalAction,
        help="use the token embedding as the output (default: as in the shape)",
    )
    parser.add_argument("--bias", action="store_true", default=None, help="with llama")
    parser.add_argument("--seed", type=int, default=0)
    arguments = {k: v for k, v in vars(parser.parse_args()).items() if v is not None}
    path = arguments.pop("path")
    start = time.perf_counter()
    try:
        make_random_gguf(path, **arguments)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{path} cannot be written: {error.strerror}")
    seconds = time.perf_counter() - start
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB in {seconds:.1f} s")


if __name__ == "__main__":
    main()
