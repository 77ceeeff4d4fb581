"""Describes a model file: its contents, the sizes of its parts, and the effect of density."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coreinfer_edge.choose.chooser import (
    SENSITIVE,
    Chooser,
    n_kept,
    settled_levels,
    sizes,
    spared,
)
from coreinfer_edge.choose.prior import Gain, Prior, from_header
from coreinfer_edge.choose.statistics import LEVELS, Ffn, Level, Statistics
from coreinfer_edge.errors import ModelFileError
from coreinfer_edge.model.ffn import LayerFFN, dense_ffn, why_not_dense
from coreinfer_edge.model.header import FFN_TENSOR, GGUFArray, GGUFHeader, GGUFTensor
from coreinfer_edge.model.source import header_of

DENSITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
LEVELS_DENSITY = 0.7

# The report has the part of an FFN's energy that these shares of its neurons carry.
SHARES = (0.1, 0.2, 0.4)

_PARTS = ("embedding", "attention", "ffn", "experts", "output", "other")


@dataclass(frozen=True)
class LayerStatistics:
    """The calibration results of one FFN.

    Attributes:
        layer: the number of its layer.
        energy: the parts of the FFN's output energy that the strongest 10, 20 and 40 % of its
            neurons carry. A neuron's energy is its mean squared activation times the squared norm
            of its column of ffn_down.
        sensitivity: KL divergence from dense to a model that keeps half of this FFN alone, in
            nats per token; None if not measured.
        low_bits_loss: the same to one that has this FFN alone at 2 bits.
        zero_share: share of activations that are exactly 0; None if not counted.
    """

    layer: int
    energy: list[float]
    sensitivity: float | None
    low_bits_loss: float | None
    zero_share: float | None


@dataclass(frozen=True)
class StatisticsReport:
    """A summary of the statistics in a model file.

    Attributes:
        tokens: tokens of the calibration text.
        gradients: whether the file has mean squared gradients.
        clusters: number of clusters for the strategy ``similarity``.
        layers: one element for each FFN.
        sensitive_layers: layers whose halving costs more than SENSITIVE times the median.
        expected_kl: pairs of a density and its KL divergence from dense to core, in nats per token,
            strategy ``energy``, measured at conversion on text held out of the statistics.
        expected_levels: the precisions that neurons could have for that.
        gain: the gain of the statistics on text like the calibration text and on other text; None
            if not measured.
        problem: why there are no statistics, or "".
    """

    tokens: int = 0
    gradients: bool = False
    clusters: int = 0
    layers: list[LayerStatistics] = field(default_factory=list)
    sensitive_layers: list[int] = field(default_factory=list)
    expected_kl: list[list[float]] = field(default_factory=list)
    expected_levels: list[Level] = field(default_factory=list)
    gain: Gain | None = None
    problem: str = ""


@dataclass(frozen=True)
class DensityCost:
    """The bytes of one density.

    Attributes:
        density: fraction of the bytes of the FFN weights, averaged over the layers; of the neurons
            where these are only kept or left out.
        ffn_bytes: bytes of the FFN weights that decoding uses.
        read_bytes_per_token: bytes of all weights read to decode one token.
        ratio_to_dense: ``read_bytes_per_token`` divided by its value at density 1.
    """

    density: float
    ffn_bytes: int
    read_bytes_per_token: int
    ratio_to_dense: float


@dataclass(frozen=True)
class LayerLevels:
    """How many neurons of a layer the statistics alone would give each level.

    Attributes:
        layer: the number of the layer.
        neurons: by level, in the order of the description's ``levels``.
        left_out: the others.
    """

    layer: int
    neurons: list[int]
    left_out: int


@dataclass(frozen=True)
class ModelDescription:
    """The description that ``coreinfer-edge inspect`` shows. Sizes are in bytes.

    Attributes:
        path: the file (the first one of a split GGUF).
        n_files: number of files.
        file_bytes: size of all files.
        gguf_version: version of the file format.
        name: ``general.name``, or "" if the file has none.
        architecture: e.g. ``"llama"``.
        parameters: number of weights.
        layers: number of layers.
        embedding_length: width of the residual stream.
        context_length: trained context in tokens, 0 where unknown.
        vocabulary: number of tokens, 0 where unknown.
        experts: experts per layer, 0 for a dense model.
        ffn_widths: neurons of the dense FFN per layer, 0 for a layer without one.
        ffn_types: for ``up``, ``gate`` and ``down``, the number of layers with each tensor type.
        bytes_by_part: size of each part of the model.
        note: why the model, or some of its layers, cannot use a core set, or "".
        coreinfer_keys: names of the ``coreinfer.*`` metadata in the file.
        levels: the precisions that neurons of a core set can have on this machine.
        densities: the bytes of some densities; empty without a dense FFN.
        levels_density: the density of ``layer_levels``.
        layer_levels: what the statistics alone would choose; empty without them.
        statistics: the calibration results.
    """

    path: str
    n_files: int
    file_bytes: int
    gguf_version: int
    name: str
    architecture: str
    parameters: int
    layers: int
    embedding_length: int
    context_length: int
    vocabulary: int
    experts: int
    ffn_widths: list[int]
    ffn_types: dict[str, dict[str, int]]
    bytes_by_part: dict[str, int]
    note: str
    coreinfer_keys: list[str]
    levels: list[Level]
    densities: list[DensityCost]
    levels_density: float
    layer_levels: list[LayerLevels]
    statistics: StatisticsReport

    def as_dict(self) -> dict[str, Any]:
        """The description in types that JSON has."""
        return dataclasses.asdict(self)


def describe(
    path: str | os.PathLike[str],
    densities: Sequence[float] = DENSITIES,
    levels: Sequence[Level] | None = None,
    levels_density: float = LEVELS_DENSITY,
) -> ModelDescription:
    """Describe the model in a GGUF file. Reads the header only, and does not load the model.

    Args:
        path: a GGUF file.
        densities: the densities to describe, each in (0, 1].
        levels: the precisions that neurons can have; None for all that there are here.
        levels_density: the density to describe the levels of each layer at.

    Raises:
        ArgumentError: the neurons cannot have these levels.
        ModelFileError: the file is missing, unreadable, not a GGUF, cut off or damaged.
    """
    header = header_of(path)
    ffn = dense_ffn(header)
    n_layers = max(header.n_layers, max(ffn, default=-1) + 1)
    # A damaged file could claim any number; it has no more layers than tensors.
    n_layers = min(n_layers, len(header.tensors))
    name = header.get("general.name")
    ffns = [Ffn(layer, of.width, of.n_bytes, of.neuron_bytes) for layer, of in sorted(ffn.items())]
    precisions = settled_levels(levels, ffns) if ffns else ("full",)
    prior, problem = _prior(header)
    return ModelDescription(
        path=str(header.path),
        n_files=len(header.files),
        file_bytes=header.file_size,
        gguf_version=header.version,
        name=name if isinstance(name, str) else "",
        architecture=header.architecture,
        parameters=sum(tensor.n_elements for tensor in header.tensors.values()),
        layers=n_layers,
        embedding_length=_int(header, "embedding_length"),
        context_length=_int(header, "context_length"),
        vocabulary=vocabulary(header),
        experts=_int(header, "expert_count"),
        ffn_widths=[ffn[layer].width if layer in ffn else 0 for layer in range(n_layers)],
        ffn_types=_ffn_types(ffn),
        bytes_by_part=_bytes_by_part(header),
        note=_note(header, ffn, n_layers),
        coreinfer_keys=[key for key in header.metadata if key.startswith("coreinfer.")],
        levels=list(precisions),
        densities=_density_costs(header, ffn, n_layers, densities, precisions),
        levels_density=levels_density,
        layer_levels=_layer_levels(prior, ffns, n_layers, levels_density, precisions),
        statistics=_statistics_report(prior, problem),
    )


def _ffn_types(ffn: dict[int, LayerFFN]) -> dict[str, dict[str, int]]:
    types: dict[str, Counter[str]] = {"up": Counter(), "gate": Counter(), "down": Counter()}
    for layer in ffn.values():
        for name, counter in types.items():
            if tensor := layer.tensors.get(f"{name}.weight"):
                counter[tensor.type] += 1
    return {name: dict(counter) for name, counter in types.items() if counter}


def _part(name: str) -> str:
    if name.startswith(("token_embd.", "position_embd.", "token_types.")):
        return "embedding"
    if name.startswith("output."):
        return "output"
    if FFN_TENSOR.fullmatch(name):
        return "ffn"
    if re.match(r"blk\.\d+\.ffn_\w*(exps|shexp|chexps|gate_inp)", name):
        return "experts"
    if re.match(r"blk\.\d+\.attn_", name) and "norm" not in name:
        return "attention"
    return "other"


def _bytes_by_part(header: GGUFHeader) -> dict[str, int]:
    sizes = dict.fromkeys(_PARTS, 0)
    for tensor in header.tensors.values():
        sizes[_part(tensor.name)] += tensor.n_bytes
    return sizes


def _density_costs(
    header: GGUFHeader,
    ffn: dict[int, LayerFFN],
    n_layers: int,
    densities: Sequence[float],
    levels: Sequence[Level],
) -> list[DensityCost]:
    if not ffn:
        return []
    widths = [layer.width for layer in ffn.values()]
    ffn_bytes = sum(layer.n_bytes for layer in ffn.values())
    elsewhere = _read_per_token(header) - ffn_bytes
    costs = []
    for density in densities:
        if tuple(levels) == ("full",) or density >= 1:
            counts = n_kept(widths, spared(list(ffn), n_layers, density))
            layers = zip(ffn.values(), counts, strict=True)
            core = sum(layer.core_bytes(kept) for layer, kept in layers)
        else:
            most = sum(layer.width * layer.neuron_bytes[0] for layer in ffn.values())
            core = int(min(density * ffn_bytes, most))
        ratio = (elsewhere + core) / max(1, elsewhere + ffn_bytes)
        costs.append(DensityCost(density, core, elsewhere + core, round(ratio, 4)))
    return costs


def bytes_read_by_type(
    header: GGUFHeader, density: float = 1.0, levels: Sequence[Level] = ("full",)
) -> dict[str, int]:
    """Bytes of weights that decoding a token reads, by the type that the file has them in.

    Args:
        header: of the model.
        density: as in ``DensityCost``.
        levels: the precisions that neurons can have.
    """
    ffn = dense_ffn(header)
    n_layers = max(header.n_layers, max(ffn, default=-1) + 1)
    ffn_bytes = sum(layer.n_bytes for layer in ffn.values())
    costs = _density_costs(header, ffn, n_layers, [density], levels)
    share = costs[0].ffn_bytes / ffn_bytes if costs and density < 1 else 1.0
    in_ffn = {tensor.name for layer in ffn.values() for tensor in layer.tensors.values()}
    result: Counter[str] = Counter()
    for tensor, n_bytes in _read_by_tensor(header):
        result[tensor.type] += int(n_bytes * (share if tensor.name in in_ffn else 1))
    return dict(result)


def _read_per_token(header: GGUFHeader) -> int:
    """Bytes of weights that the dense model reads to decode one token."""
    return sum(n_bytes for _, n_bytes in _read_by_tensor(header))


def _read_by_tensor(header: GGUFHeader) -> Iterator[tuple[GGUFTensor, int]]:
    experts = max(1, _int(header, "expert_count"))
    used = min(max(1, _int(header, "expert_used_count")), experts)
    for tensor in header.tensors.values():
        if _part(tensor.name) == "embedding" and not (
            header.is_tied and tensor.name == "token_embd.weight"
        ):
            # A lookup reads one row.
            yield tensor, tensor.n_bytes // max(1, tensor.shape[-1] if tensor.shape else 1)
        elif "_exps." in tensor.name:
            yield tensor, tensor.n_bytes * used // experts
        else:
            yield tensor, tensor.n_bytes


def _note(header: GGUFHeader, ffn: dict[int, LayerFFN], n_layers: int) -> str:
    if not ffn:
        return (
            f"no layer has a dense FFN ({why_not_dense(header)}), so this model can only run dense"
        )
    if len(ffn) < n_layers:
        return f"{n_layers - len(ffn)} of {n_layers} layers have no dense FFN and stay as they are"
    return ""


def _int(header: GGUFHeader, key: str) -> int:
    value = header.of_architecture(key)
    if isinstance(value, GGUFArray) and value.type not in ("str", "f32", "f64"):
        return max((int(n) for n in value.read()), default=0)
    return value if isinstance(value, int) else 0


def vocabulary(header: GGUFHeader) -> int:
    """The number of tokens that a model knows; 0 where the file does not say."""
    tokens = header.get("tokenizer.ggml.tokens")
    if isinstance(tokens, GGUFArray):
        return tokens.length
    return _int(header, "vocab_size")


def _prior(header: GGUFHeader) -> tuple[Prior | None, str]:
    """The prior in a model file, or why it cannot be used."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            return from_header(header), str(caught[0].message) if caught else ""
    except ModelFileError as error:
        return None, str(error)


def _layer_levels(
    prior: Prior | None,
    ffns: Sequence[Ffn],
    n_layers: int,
    density: float,
    levels: Sequence[Level],
) -> list[LayerLevels]:
    if prior is None or [ffn.layer for ffn in ffns] != prior.layers:
        return []
    chooser = Chooser("static", ffns, n_layers, prior.down_norms, prior, None, levels)
    nothing = Statistics([], [], [], [], np.zeros(0, dtype=np.float32))
    core = chooser.choose(nothing, density)
    result = []
    for i, ffn in enumerate(ffns):
        if i in core:
            counts = sizes(core[i])
            kept = [int(counts[LEVELS.index(level)]) for level in levels]
        else:
            kept = [ffn.n_ff if level == "full" else 0 for level in levels]
        result.append(LayerLevels(ffn.layer, kept, ffn.n_ff - sum(kept)))
    return result


def _statistics_report(prior: Prior | None, problem: str) -> StatisticsReport:
    """Describe the prior; ``problem`` says why there is none."""
    if prior is None:
        return StatisticsReport(problem=problem)
    layers = [_layer(prior, i) for i in range(len(prior.layers))]
    known = [layer.sensitivity for layer in layers if layer.sensitivity is not None]
    limit = SENSITIVE * float(np.median(known)) if known else np.inf
    return StatisticsReport(
        tokens=prior.n_tokens,
        gradients=prior.gradient is not None,
        clusters=len(prior.clusters) if prior.clusters else 0,
        layers=layers,
        sensitive_layers=[
            layer.layer for layer in layers if layer.sensitivity and layer.sensitivity > limit
        ],
        expected_kl=[[round(density, 4), kl] for density, kl in prior.quality.items()],
        expected_levels=list(prior.quality_levels),
        gain=prior.gain,
    )


def _layer(prior: Prior, i: int) -> LayerStatistics:
    energy = np.sort(prior.mean_square[i].astype(np.float64) * prior.down_norms[i])[::-1]
    total = float(energy.sum()) or 1.0
    return LayerStatistics(
        layer=prior.layers[i],
        energy=[
            float(energy[: max(1, round(share * len(energy)))].sum()) / total for share in SHARES
        ],
        sensitivity=None if prior.sensitivity is None else float(prior.sensitivity[i]),
        low_bits_loss=None if prior.low_bits_loss is None else float(prior.low_bits_loss[i]),
        zero_share=None if prior.zero_share is None else float(prior.zero_share[i]),
    )
