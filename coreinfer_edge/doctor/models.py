"""What a device can run: models of common sizes and quantisations, and a plan for each."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf

from coreinfer_edge.binding.gguf import type_name
from coreinfer_edge.choose.statistics import Level
from coreinfer_edge.doctor.gpus import OnGpus
from coreinfer_edge.errors import MemoryBudgetError
from coreinfer_edge.measure.description import bytes_read_by_type, vocabulary
from coreinfer_edge.measure.random_llama import SHAPES, Shape, typed_tensors
from coreinfer_edge.model.ffn import dense_ffn
from coreinfer_edge.model.header import GGUFHeader, GGUFTensor
from coreinfer_edge.run.load_plan import plan_memory, poor_density
from coreinfer_edge.run.memory_plan import MemoryPlan
from coreinfer_edge.run.needed_memory import cached_numbers_per_token

# Shapes that people run, by the size that their names have. All are Llamas in this arithmetic: what
# a Qwen has beside its matrices is a thousandth of it.
SIZES = {
    "0.1B": Shape(30, 576, 1536, 9, 3, 49152, 8192, tied=True),  # SmolLM2 135M
    "0.5B": Shape(24, 896, 4864, 14, 2, 151936, 32768, tied=True),  # Qwen 2.5
    "1B": SHAPES["1b"],
    "3B": SHAPES["3b"],
    "8B": SHAPES["8b"],
    "14B": Shape(48, 5120, 13824, 40, 8, 152064, 32768),  # Qwen 2.5
    "32B": Shape(64, 5120, 27648, 40, 8, 152064, 32768),  # Qwen 2.5
    "70B": Shape(80, 8192, 28672, 64, 8, 128256, 8192),  # Llama 3
}
TYPES = ("q4_0", "q4_k_m", "q8_0")

# Tokens in the context at which speed is told: a question and half an answer.
SPEED_CONTEXT = 128


@dataclass(frozen=True)
class Rates:
    """How fast a device is, in bytes and seconds; ``rates`` measures it.

    Attributes:
        memory: bytes that the threads of decoding read from memory in a second.
        weights: bytes of weights that they multiply in a second, by ggml's type; memory included.
        layer_seconds: what a layer takes beside its weights.
        entry_seconds: what sampling takes for each entry of the vocabulary.
        disk: bytes that streaming reads in a second; None if not measured.
    """

    memory: float
    weights: Mapping[str, float]
    layer_seconds: float
    entry_seconds: float = 0.0
    disk: float | None = None

    def of(self, ggml_type: str) -> float:
        """Bytes of weights of this type in a second; that of the most similar type measured."""
        kind = ggml_type.lower()
        if kind in ("f32", "f16", "bf16") or not self.weights:
            return self.memory
        similar = "q8_0" if kind == "q8_0" else "q4_k" if "_k" in kind or kind[0] == "i" else "q4_0"
        return self.weights.get(similar) or min(self.weights.values())


@dataclass(frozen=True)
class Prediction:
    """How a model would run here.

    Attributes:
        size: as the name of a model has it, like ``"3B"``; "" for a file.
        type: its quantisation, like ``"q4_k_m"``; of a file, the type of most weights.
        file_bytes: size of the weights.
        runs: ``"whole"`` (all weights in memory), ``"set once"`` (levels set when it is loaded),
            ``"streams"`` (FFN weights stay in the file), or ``"refused"``.
        density: part of the bytes of the FFN weights that a token reads.
        levels: the precisions that neurons can have.
        context: tokens.
        memory_bytes: what it takes.
        bytes_per_token: weights, keys and values that a token reads, at SPEED_CONTEXT.
        tokens_per_second: of decoding; None if nothing was measured, or it is refused.
        prompt_read_seconds: what a prompt waits for the disk; 0 if it reads nothing.
        is_poor: the density is so low that the text suffers much.
        on_gpus: what the GPUs would hold of it; None without one, and for a file, which has a plan.
    """

    size: str
    type: str
    file_bytes: int
    runs: str
    density: float = 0.0
    levels: tuple[Level, ...] = ()
    context: int = 0
    memory_bytes: int = 0
    bytes_per_token: int = 0
    tokens_per_second: float | None = None
    prompt_read_seconds: float | None = None
    is_poor: bool = False
    on_gpus: OnGpus | None = None


def absent_header(size: str, type: str) -> GGUFHeader:
    """The header that a model of ``SIZES`` would have, without a file and without a vocabulary."""
    shape = SIZES[size]
    path = Path(f"{size}-{type}")
    tensors = {
        spec.name: GGUFTensor(
            name=spec.name,
            type=type_name(int(spec.type)),
            ggml_type=int(spec.type),
            shape=tuple(reversed(spec.shape)),
            file=path,
            offset=0,
            n_bytes=spec.n_bytes,
        )
        for spec in typed_tensors(shape, type)
    }
    numbers = {
        "block_count": shape.n_layer,
        "context_length": shape.n_ctx,
        "embedding_length": shape.n_embd,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": shape.n_head_kv,
        "vocab_size": shape.n_vocab,
    }
    metadata = {"general.architecture": "llama"} | {f"llama.{k}": v for k, v in numbers.items()}
    return GGUFHeader(
        path=path,
        files=(),
        file_size=sum(tensor.n_bytes for tensor in tensors.values()),
        version=3,
        architecture="llama",
        alignment=gguf.GGUF_DEFAULT_ALIGNMENT,
        metadata=metadata,
        value_types={},
        tensors=tensors,
    )


def predictions(rates: Rates | None, memory: int | str = "auto") -> Iterator[Prediction]:
    """What would become of each size and type of models."""
    refused = False
    for size in SIZES:
        for type in TYPES:
            header = absent_header(size, type)
            if refused:  # so is what is larger
                yield Prediction(size, type, header.file_size, "refused")
                continue
            found = predict(header, rates, memory, size, type)
            # the largest type of a size can be larger than the smallest of the next
            refused = found.runs == "refused" and type == TYPES[0]
            yield found


def predict(
    header: GGUFHeader,
    rates: Rates | None,
    memory: int | str = "auto",
    size: str = "",
    type: str = "",
) -> Prediction:
    """What would become of a model with this memory, by the plan that ``memory=`` makes."""
    try:
        plan = planned(header, memory)
    except MemoryBudgetError:
        return Prediction(size, type, header.file_size, "refused")
    return of_plan(header, plan, rates, size, type)


def planned(header: GGUFHeader, memory: int | str) -> MemoryPlan:
    """The plan that ``memory=`` makes.

    Raises:
        MemoryBudgetError: it would not fit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plan_memory(header, memory)


def of_plan(
    header: GGUFHeader, plan: MemoryPlan, rates: Rates | None, size: str = "", type: str = ""
) -> Prediction:
    """What a plan promises."""
    read = bytes_read_by_type(header, plan.density, plan.levels)
    cached = cached_bytes(header, SPEED_CONTEXT)
    return Prediction(
        size,
        type or main_type(header),
        header.file_size,
        "whole" if plan.whole else "set once" if plan.set_once else "streams",
        plan.density if not plan.whole else 1.0,
        plan.levels,
        plan.n_ctx,
        plan.total,
        bytes_per_token=int(sum(read.values())) + cached,
        tokens_per_second=tokens_per_second(header, read, cached, rates),
        prompt_read_seconds=_prompt_read_seconds(header, plan, rates),
        is_poor=not plan.whole and plan.density < poor_density(plan.levels),
    )


def cached_bytes(header: GGUFHeader, context: int) -> int:
    """Keys and values of so many tokens."""
    return 2 * context * cached_numbers_per_token(header)


def tokens_per_second(
    header: GGUFHeader, read: Mapping[str, float], cached: float, rates: Rates | None
) -> float | None:
    """The speed of decoding: bytes over rates, and what layers and the vocabulary take besides."""
    if rates is None:
        return None
    seconds = cached / rates.memory + header.n_layers * rates.layer_seconds
    seconds += vocabulary(header) * rates.entry_seconds
    return 1 / (seconds + sum(n_bytes / rates.of(kind) for kind, n_bytes in read.items()))


def _prompt_read_seconds(header: GGUFHeader, plan: MemoryPlan, rates: Rates | None) -> float | None:
    """Reading the FFN weights twice: for the prompt, and to gather the core set."""
    if not plan.streamed:
        return 0.0
    if rates is None or not rates.disk:
        return None
    return 2 * sum(layer.weight_bytes for layer in dense_ffn(header).values()) / rates.disk


def main_type(header: GGUFHeader) -> str:
    by_type: Counter[str] = Counter()
    for tensor in header.tensors.values():
        by_type[tensor.type] += tensor.n_bytes
    return by_type.most_common(1)[0][0] if by_type else ""
