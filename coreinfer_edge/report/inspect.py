"""Describes a model file: what is in it, which parts take how much, what density does to them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coreinfer_edge.choose.chooser import n_kept, spared
from coreinfer_edge.model.ffn import LayerFFN, dense_ffn, why_not_dense
from coreinfer_edge.model.header import (
    FFN_TENSOR,
    GGUFArray,
    GGUFHeader,
    read_header,
)
from coreinfer_edge.report import prior as prior_report
from coreinfer_edge.report.prior import StatisticsReport

if TYPE_CHECKING:
    from rich.console import Group

DENSITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)

_PARTS = ("embedding", "attention", "ffn", "experts", "output", "other")


@dataclass(frozen=True)
class DensityCost:
    """What one density costs.

    Attributes:
        density: fraction of FFN neurons kept, averaged over the layers.
        ffn_bytes: bytes of the FFN weights that decoding uses.
        read_bytes_per_token: bytes of all weights read to decode one token.
        ratio_to_dense: that, divided by the same at density 1.
    """

    density: float
    ffn_bytes: int
    read_bytes_per_token: int
    ratio_to_dense: float


@dataclass(frozen=True)
class ModelDescription:
    """What ``coreinfer-edge inspect`` shows. Sizes are in bytes.

    Attributes:
        path: the file (the first one of a split GGUF).
        n_files: number of files.
        file_bytes: size of all files.
        gguf_version: version of the file format.
        name: ``general.name``, or "" where the file has none.
        architecture: e.g. ``"llama"``.
        parameters: number of weights.
        layers: number of layers.
        embedding_length: width of the residual stream.
        context_length: trained context in tokens, 0 where unknown.
        vocabulary: number of tokens, 0 where unknown.
        experts: experts per layer, 0 for a dense model.
        ffn_widths: neurons of the dense FFN per layer, 0 where a layer has none.
        ffn_types: for ``up``, ``gate`` and ``down``, the number of layers with each tensor type.
        bytes_by_part: size of each part of the model.
        note: what keeps the model from decoding with a core set, or "".
        coreinfer_keys: names of the ``coreinfer.*`` metadata in the file.
        densities: the cost of some densities; empty without a dense FFN.
        statistics: what calibration says of the neurons.
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
    densities: list[DensityCost]
    statistics: StatisticsReport

    def as_dict(self) -> dict[str, Any]:
        """The description in types that JSON has."""
        return dataclasses.asdict(self)


def describe(
    path: str | os.PathLike[str], densities: Sequence[float] = DENSITIES
) -> ModelDescription:
    """Describe the model in a GGUF file. Reads the header only, and does not load the model.

    Args:
        path: a GGUF file.
        densities: the densities to show the cost of, each in (0, 1].

    Raises:
        ModelFileError: the file is missing, unreadable, no GGUF, cut off or damaged.
    """
    header = read_header(path)
    ffn = dense_ffn(header)
    n_layers = max(header.n_layers, max(ffn, default=-1) + 1)
    # A damaged count could be absurd; the file has no more layers than tensors.
    n_layers = min(n_layers, len(header.tensors))
    name = header.get("general.name")
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
        vocabulary=_vocabulary(header),
        experts=_int(header, "expert_count"),
        ffn_widths=[ffn[layer].width if layer in ffn else 0 for layer in range(n_layers)],
        ffn_types=_ffn_types(ffn),
        bytes_by_part=_bytes_by_part(header),
        note=_note(header, ffn, n_layers),
        coreinfer_keys=[key for key in header.metadata if key.startswith("coreinfer.")],
        densities=_density_costs(header, ffn, n_layers, densities),
        statistics=prior_report.report(header),
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
    header: GGUFHeader, ffn: dict[int, LayerFFN], n_layers: int, densities: Sequence[float]
) -> list[DensityCost]:
    if not ffn:
        return []
    widths = [layer.width for layer in ffn.values()]
    ffn_bytes = sum(layer.n_bytes for layer in ffn.values())
    elsewhere = _read_per_token(header) - ffn_bytes
    costs = []
    for density in densities:
        counts = n_kept(widths, spared(list(ffn), n_layers, density))
        core = sum(layer.core_bytes(kept) for layer, kept in zip(ffn.values(), counts, strict=True))
        ratio = (elsewhere + core) / max(1, elsewhere + ffn_bytes)
        costs.append(DensityCost(density, core, elsewhere + core, round(ratio, 4)))
    return costs


def _read_per_token(header: GGUFHeader) -> int:
    """Bytes of weights that decoding one token reads, dense."""
    experts = max(1, _int(header, "expert_count"))
    used = min(max(1, _int(header, "expert_used_count")), experts)
    tied = "output.weight" not in header.tensors
    total = 0
    for tensor in header.tensors.values():
        if _part(tensor.name) == "embedding" and not (tied and tensor.name == "token_embd.weight"):
            # A lookup reads one row.
            total += tensor.n_bytes // max(1, tensor.shape[-1] if tensor.shape else 1)
        elif "_exps." in tensor.name:
            total += tensor.n_bytes * used // experts
        else:
            total += tensor.n_bytes
    return total


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


def _vocabulary(header: GGUFHeader) -> int:
    tokens = header.get("tokenizer.ggml.tokens")
    if isinstance(tokens, GGUFArray):
        return tokens.length
    return _int(header, "vocab_size")


# --- for people ----------------------------------------------------------------------------------


def render(description: ModelDescription) -> Group:
    """The description as tables for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    d = description
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    # Text, not str: the file's own words must not be taken for rich's markup.
    facts.add_column(overflow="fold")
    widths = sorted({width for width in d.ffn_widths if width})
    width = (
        f"{widths[0]:,}"
        if len(widths) == 1
        else f"{widths[0]:,} to {widths[-1]:,}"
        if widths
        else "none"
    )
    types = "; ".join(
        f"{part} " + ", ".join(f"{type_} x{n}" if len(by) > 1 else type_ for type_, n in by.items())
        for part, by in d.ffn_types.items()
    )
    for label, value in (
        ("Model", d.name or "(no name)"),
        ("File", d.path + (f" and {d.n_files - 1} more" if d.n_files > 1 else "")),
        ("Size", f"{_mebibytes(d.file_bytes)}, GGUF version {d.gguf_version}"),
        ("Architecture", d.architecture + (f", {d.experts} experts" if d.experts else "")),
        ("Parameters", _millions(d.parameters)),
        ("Layers", f"{d.layers}, {d.embedding_length:,} wide"),
        ("FFN neurons", f"{width} per layer" if widths else "none"),
        ("FFN types", types or "none"),
        ("Context", f"{d.context_length:,} tokens"),
        ("Vocabulary", f"{d.vocabulary:,} tokens"),
        ("coreinfer.* keys", ", ".join(d.coreinfer_keys) or "none"),
    ):
        facts.add_row(
            label,
            Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)),
        )

    parts = Table(title="Where the bytes are", title_justify="left")
    parts.add_column("part")
    parts.add_column("size", justify="right")
    parts.add_column("share", justify="right")
    total = max(1, sum(d.bytes_by_part.values()))
    for part, size in d.bytes_by_part.items():
        if size:
            parts.add_row(part, _mebibytes(size), f"{size / total:.1%}")

    blocks: list[Any] = [facts, Text(), parts]
    if d.densities:
        costs = Table(title="What density does", title_justify="left")
        for column in ("density", "FFN", "read per token", "of dense"):
            costs.add_column(column, justify="right")
        for cost in d.densities:
            costs.add_row(
                f"{cost.density:g}",
                _mebibytes(cost.ffn_bytes),
                _mebibytes(cost.read_bytes_per_token),
                f"{cost.ratio_to_dense:.1%}",
            )
        blocks += [Text(), costs]
    if statistics := prior_report.tables(d.statistics):
        blocks += [Text(), *statistics]
    if d.note:
        blocks += [Text(), Text(f"Note: {d.note}.")]
    return Group(*blocks)


def _mebibytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"


def _millions(n: int) -> str:
    return f"{n / 1e9:.2f} billion" if n >= 1e9 else f"{n / 1e6:.1f} million"
