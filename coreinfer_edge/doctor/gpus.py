"""What the GPUs of a device would hold of a model that is not there, by its sizes alone.

``EdgeLLM(gpu_memory="auto")`` plans with llama.cpp's own count, for which it needs the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from coreinfer_edge.binding.core import constants
from coreinfer_edge.choose.chooser import settled_levels
from coreinfer_edge.choose.statistics import Ffn
from coreinfer_edge.doctor.device import Gpu
from coreinfer_edge.model.ffn import dense_ffn
from coreinfer_edge.model.header import GGUFHeader
from coreinfer_edge.run.arguments import default_context
from coreinfer_edge.run.gpu_budget import AUTO_MARGIN_LEAST, CUDA_RUN_BYTES
from coreinfer_edge.run.gpu_planner import LEAST_DENSITY, LEAST_WITH_LEVELS
from coreinfer_edge.run.needed_memory import cached_numbers_per_token, padded_context
from coreinfer_edge.run.planning import AUTO_MARGIN, DEFAULT_BATCH

# Tokens at once where FFN weights are sent across for them.
_CORE_BATCH = 64

_F16, _F32 = 2, 4


@dataclass(frozen=True)
class OnGpus:
    """How a model would lie on all GPUs together.

    Attributes:
        runs: ``"whole"``; ``"core sets"``, with its FFNs in main memory; ``"part"``, with some
            layers; or ``"no"``, if main memory has no room for the rest.
        density: of the core sets; 1.0 if it is whole, 0.0 else.
        whole_bytes: what the whole model would take of them.
    """

    runs: Literal["whole", "core sets", "part", "no"]
    density: float
    whole_bytes: int


def on_gpus(header: GGUFHeader, gpus: Sequence[Gpu], host_bytes: int) -> OnGpus | None:
    """What they would hold; None without any.

    Args:
        header: of a Llama without a file.
        gpus: of the device.
        host_bytes: of main memory that the model may have.
    """
    if not gpus:
        return None
    room = 0
    for gpu in gpus:
        margin = max(AUTO_MARGIN_LEAST, int(AUTO_MARGIN * gpu.free_bytes))
        room += max(0, gpu.free_bytes - margin - (CUDA_RUN_BYTES if gpu.is_cuda else 0))
    ffns = dense_ffn(header)
    ffn_bytes = sum(of.n_bytes for of in ffns.values())
    # on a GPU a tied embedding is the output; its rows are looked up in main memory
    weights = sum(tensor.n_bytes for tensor in header.tensors.values())
    weights -= 0 if header.is_tied else header.tensors["token_embd.weight"].n_bytes
    n_ctx = padded_context(default_context(header))
    cache = _F16 * n_ctx * cached_numbers_per_token(header)
    whole = weights + cache + DEFAULT_BATCH * _computing_bytes(header, n_ctx)
    if whole <= room:
        return OnGpus("whole", 1.0, whole)
    on_their_way = max(of.n_bytes for of in ffns.values())
    on_their_way += constants().weights_ahead * sum(gpu.is_cuda for gpu in gpus)
    computing = _CORE_BATCH * _computing_bytes(header, n_ctx)
    left = room - (weights - ffn_bytes + cache + computing + on_their_way)
    density = min(1.0, max(0.0, left / ffn_bytes))
    levels = settled_levels(
        None, [Ffn(i, of.width, of.n_bytes, of.device_neuron_bytes) for i, of in ffns.items()]
    )
    least = LEAST_DENSITY if levels == ("full",) else LEAST_WITH_LEVELS
    if density >= least and ffn_bytes <= host_bytes:
        return OnGpus("core sets", density, whole)
    return OnGpus("part" if whole - room <= host_bytes else "no", 0.0, whole)


def _computing_bytes(header: GGUFHeader, n_ctx: int) -> int:
    """Of a token in a batch, with flash attention; ``tests/doctor`` holds it against a plan."""
    width, n_ff = (
        int(str(header.of_architecture(key))) for key in ("embedding_length", "feed_forward_length")
    )
    return _F32 * (3 * n_ff + 7 * width) + _F16 * n_ctx
