"""Refuses what is a valid GGUF, but that libllama would die of or cannot run.

Every rule stands for an assertion in libllama or ggml that a file can reach: there the process
would end instead of raising an error. What libllama reports as an error by itself (missing keys,
wrong value types, missing tensors) is left to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from coreinfer_edge.binding.gguf import supports_architecture
from coreinfer_edge.errors import ModelFileError, UnsupportedModelError
from coreinfer_edge.model.header import GGUFArray, GGUFHeader

# ggml's CPU buffers, mapped files among them, start at a multiple of this.
TENSOR_ALIGNMENT = 32
# llama-hparams.h
MAX_LAYERS = 512
MAX_EXPERTS = 1024
# Far beyond any model; at 2**31 the size of the cache overflows.
MAX_WINDOW = 2**26

_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
# Numbers for other uses, and what ggml quantises activations to.
_NEVER_WEIGHTS = ("i8", "i16", "i32", "i64", "f64", "q8_1", "q8_K")
_EPSILONS = (
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
    "attention.group_norm_epsilon",
)
# The tokenizers of encoders (BERT, T5), of files with no vocabulary, of llama.cpp's own tests, and
# of RWKV, which has no FFN for us and whose tokenizer throws through the C API.
_NO_TEXT_TOKENIZERS = ("bert", "t5", "rwkv", "no_vocab", "none", "test")
# Beginning and end of a text where the file names none (llama-vocab.cpp, "default special tokens").
_DEFAULT_BOS_EOS = {"llama": (1, 2), "plamo2": (1, 2), "gpt2": (11, 11)}
# llama-vocab.cpp sets add_bos for these where the file does not say.
_PRE_WITH_BOS = (
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
    "chameleon",
)
# Their graphs assert that rope turns the whole head (src/models, "n_embd_head == n_rot").
# fmt: off
_TURNS_WHOLE_HEADS = frozenset({
    "apertus", "arcee", "arctic", "baichuan", "chameleon", "codeshell", "cogvlm", "cohere2moe",
    "dbrx", "deci", "deepseek", "dots1", "dream", "ernie4_5", "ernie4_5-moe", "exaone",
    "exaone-moe", "exaone4", "falcon", "granite", "granite_swa", "graniteswitch", "grok",
    "grovemoe", "hunyuan-moe", "hunyuan_vl", "hy_v3", "internlm2", "jais2", "llada", "llada-moe",
    "llama", "llama4", "maincoder", "mellum", "mistral3", "olmo", "olmo2", "olmoe", "orion",
    "paddleocr", "pangu-embedded", "plamo", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe",
    "qwen3vl", "qwen3vlmoe", "rnd1", "seed_oss", "smallthinker", "smollm3", "starcoder2",
    "talkie", "xverse",
})
# Every layer of theirs has attention, with keys and values of one size.
_ATTENTION_ONLY = _TURNS_WHOLE_HEADS - {"deci"} | {
    "bitnet", "bloom", "chatglm", "cohere2", "command-r", "gemma", "gemma2", "gemma3", "glm4",
    "gpt2", "gptneox", "jais", "mpt", "nemotron", "openelm", "opt", "phi2", "phi3", "qwen",
    "refact",
    "stablelm", "starcoder",
}
# fmt: on


def check_loadable(header: GGUFHeader) -> None:
    """Refuse what llama.cpp would not survive, or cannot run. The data of tensors is not read.

    Raises:
        UnsupportedModelError: llama.cpp does not know the architecture, or the model is none that
            continues text.
        ModelFileError: the metadata contradicts itself.
    """
    _check_architecture(header)
    _check_sizes(header)
    _check_attention(header)
    _check_experts(header)
    _check_tensor_types(header)
    _check_vocabulary(header)


def _damaged(header: GGUFHeader, what: str) -> ModelFileError:
    return ModelFileError(f"{header.path} is damaged: {what}; download or convert it again")


def _check_architecture(header: GGUFHeader) -> None:
    if not supports_architecture(header.architecture):
        raise UnsupportedModelError(
            f"{header.path} holds a model of the architecture {header.architecture[:64]!r}, which"
            " this version of llama.cpp does not know: choose another model, or update"
            " coreinfer-edge"
        )
    if header.architecture == "clip":
        raise UnsupportedModelError(
            f"{header.path} holds the image encoder of a model (architecture 'clip'), which cannot"
            " generate text: name the file of the language model"
        )


def _check_sizes(header: GGUFHeader) -> None:
    layers = header.of_architecture("block_count")
    if isinstance(layers, int) and not 0 < layers <= MAX_LAYERS:
        raise _damaged(header, f"it claims {layers:,} layers, and 1 to {MAX_LAYERS} can be")
    extra = header.of_architecture("nextn_predict_layers")
    if isinstance(extra, int) and isinstance(layers, int) and extra > layers:
        raise _damaged(header, f"{extra:,} of its {layers} layers predict further tokens")
    for key in _EPSILONS:
        epsilon = header.of_architecture(key)
        if isinstance(epsilon, float) and not 0 <= epsilon < float("inf"):
            raise _damaged(header, f"{key} is {epsilon}, and must not be negative")
    threshold = header.of_architecture("hidden_activation_threshold")
    if isinstance(threshold, float) and not math.isfinite(threshold):
        raise _damaged(header, f"hidden_activation_threshold is {threshold}")
    scaling = header.of_architecture("rope.scaling.type")
    if isinstance(scaling, str) and scaling not in _ROPE_SCALINGS:
        raise UnsupportedModelError(
            f"{header.path} scales its positions by {scaling[:64]!r} (key rope.scaling.type), and"
            f" llama.cpp knows {', '.join(_ROPE_SCALINGS)}: choose another model"
        )
    if header.alignment % TENSOR_ALIGNMENT:
        raise _damaged(
            header,
            f"its tensors are aligned to {header.alignment} bytes, and a mapped file needs"
            f" {TENSOR_ALIGNMENT}",
        )


def _check_attention(header: GGUFHeader) -> None:
    heads = _int(header, "attention.head_count")
    by_default = _int(header, "embedding_length") // heads if heads else 0
    for window in ("", "_swa"):
        head_size = _int(header, f"attention.key_length{window}", by_default)
        turned = _int(header, f"rope.dimension_count{window}", head_size)
        full = header.architecture in _TURNS_WHOLE_HEADS
        if head_size and not (
            0 < turned <= head_size and turned % 2 == 0 and (turned == head_size or not full)
        ):
            raise _damaged(
                header,
                f"its positions turn {turned:,} elements of each head (rope.dimension_count"
                f"{window}), and a head has {head_size:,}",
            )
    key_size = _int(header, "attention.key_length", by_default)
    value_size = _int(header, "attention.value_length", by_default)
    attention_only = header.architecture in _ATTENTION_ONLY
    if attention_only and key_size != value_size:
        raise _damaged(
            header, f"its heads have keys of {key_size:,} elements and values of {value_size:,}"
        )
    for heads, kv_heads in _heads_by_layer(header):
        if heads and (heads % kv_heads if kv_heads else attention_only):
            raise _damaged(
                header, f"{heads:,} attention heads cannot share {kv_heads:,} key-value heads"
            )
    for layer in range(header.n_layers - _int(header, "nextn_predict_layers")):
        names = (f"blk.{layer}.attn_qkv.weight", f"blk.{layer}.attn_q.weight")
        if attention_only and not any(name in header.tensors for name in names):
            raise _damaged(header, f"layer {layer} has no attention ({' or '.join(names)})")
    window_size = _int(header, "attention.sliding_window")
    if window_size > MAX_WINDOW:
        raise _damaged(
            header, f"attention.sliding_window is {window_size:,}, and {MAX_WINDOW:,} is the most"
        )
    pattern = header.of_architecture("attention.sliding_window_pattern")
    windowless = pattern == 1 or (
        isinstance(pattern, GGUFArray) and pattern.type != "str" and not any(pattern.read())
    )
    if window_size and windowless:
        raise _damaged(header, "it has a sliding window and, by its pattern, no layer that uses it")


def _heads_by_layer(header: GGUFHeader) -> Iterator[tuple[int, int]]:
    """Heads and key-value heads of each layer; the file has a number or an array of either."""
    counts = []
    for key in ("attention.head_count", "attention.head_count_kv"):
        value = header.of_architecture(key)
        if isinstance(value, GGUFArray) and value.type != "str":
            counts.append([int(n) for n in value.read()[:MAX_LAYERS]])
        elif isinstance(value, int):
            counts.append([value] * min(header.n_layers, MAX_LAYERS))
    if len(counts) == 2:
        yield from zip(*counts, strict=False)


def _check_tensor_types(header: GGUFHeader) -> None:
    for tensor in header.tensors.values():
        if tensor.type in _NEVER_WEIGHTS and "tid2eid" not in tensor.name:
            raise _damaged(
                header,
                f"tensor {tensor.name} is of the type {tensor.type}, which weights never are",
            )
        is_vector = max(tensor.shape, default=1) == tensor.n_elements
        if is_vector and tensor.type != "f32" and tensor.name.endswith((".bias", "norm.weight")):
            raise _damaged(
                header, f"tensor {tensor.name} is a vector of the type {tensor.type}, not f32"
            )


def _check_experts(header: GGUFHeader) -> None:
    experts = _int(header, "expert_count")
    used_value = header.of_architecture("expert_used_count")
    if isinstance(used_value, GGUFArray) and used_value.type != "str":
        used = max((int(n) for n in used_value.read()), default=0)
    else:
        used = _int(header, "expert_used_count")
    groups = _int(header, "expert_group_count")
    groups_used = _int(header, "expert_group_used_count")
    if header.architecture in ("hunyuan-vl", "hunyuan-dense") and experts <= 1:
        experts = used = 0
    if experts > MAX_EXPERTS:
        raise _damaged(header, f"it claims {experts:,} experts, and {MAX_EXPERTS} can be")
    if not (0 < used <= experts if experts else used == 0):
        raise _damaged(header, f"it uses {used:,} of {experts:,} experts")
    if groups and not (
        groups < experts and (groups == 1 or (experts % groups == 0 and 0 < groups_used < groups))
    ):
        raise _damaged(header, f"it uses {groups_used} of {groups} groups of {experts} experts")


def _int(header: GGUFHeader, key: str, default: int = 0) -> int:
    value = header.of_architecture(key)
    return value if isinstance(value, int) else default


def _check_vocabulary(header: GGUFHeader) -> None:
    model = header.get("tokenizer.ggml.model")
    if not isinstance(model, str) or model in _NO_TEXT_TOKENIZERS:
        raise UnsupportedModelError(
            f"{header.path} cannot generate text here (its tokenizer is {model!r}): choose a model"
            " that continues text, with one of llama.cpp's other tokenizers"
        )
    array = header.get("tokenizer.ggml.tokens")
    if not isinstance(array, GGUFArray) or array.type != "str" or array.length == 0:
        raise _damaged(header, "it lists no tokens under tokenizer.ggml.tokens")
    # As in llama.cpp: an empty token gets a name of its own.
    tokens = {token or b"[EMPTY_%d]" % i for i, token in enumerate(array.read())}
    if len(tokens) < array.length:
        raise _damaged(
            header, f"{array.length - len(tokens):,} of its {array.length:,} tokens are there twice"
        )
    if model == "llama":
        for byte in range(256):
            if b"<0x%02X>" % byte not in tokens and bytes([byte]) not in tokens:
                raise UnsupportedModelError(
                    f"{header.path} has no token for the byte 0x{byte:02X}, and llama.cpp cannot"
                    " go on where a text has it: choose another conversion of the model"
                )
    _check_special_tokens(header, model, array.length)


def _check_special_tokens(header: GGUFHeader, model: str, n_tokens: int) -> None:
    defaults = _DEFAULT_BOS_EOS.get(model, (-1, -1))
    pre = header.get("tokenizer.ggml.pre")
    by_default = model == "llama" or (model == "gpt2" and pre in _PRE_WITH_BOS), False
    for name, default, added in zip(("bos", "eos"), defaults, by_default, strict=True):
        token = header.get(f"tokenizer.ggml.{name}_token_id")
        # libllama itself falls back to the default where the file's id is out of range.
        known = (isinstance(token, int) and 0 <= token < n_tokens) or 0 <= default < n_tokens
        if header.get(f"tokenizer.ggml.add_{name}_token", added) and not known:
            raise _damaged(
                header,
                f"every text gets a {name} token, and tokenizer.ggml.{name}_token_id is {token}"
                f" where there are {n_tokens:,} tokens",
            )
