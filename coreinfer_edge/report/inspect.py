"""Tables of the description of a model file, and of a memory plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coreinfer_edge.choose.statistics import level_names
from coreinfer_edge.measure.description import ModelDescription
from coreinfer_edge.report import prior as prior_report
from coreinfer_edge.report.tables import mebibytes, table

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from coreinfer_edge.run.gpu_plan import GpuPlan
    from coreinfer_edge.run.memory_plan import MemoryPlan


def render(description: ModelDescription) -> Group:
    """The description as tables for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    d = description
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    # Text, not str: rich must not read the file's own words as markup.
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
        ("Size", f"{mebibytes(d.file_bytes)}, GGUF version {d.gguf_version}"),
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

    total = max(1, sum(d.bytes_by_part.values()))
    blocks: list[Any] = [
        facts,
        Text(),
        table(
            ["part", "size", "share"],
            (
                [part, mebibytes(size), f"{size / total:.1%}"]
                for part, size in d.bytes_by_part.items()
                if size
            ),
            "Where the bytes are",
        ),
    ]
    if d.densities:
        blocks.append(
            table(
                ["density", "FFN", "read per token", "of dense"],
                (
                    [
                        f"{cost.density:g}",
                        mebibytes(cost.ffn_bytes),
                        mebibytes(cost.read_bytes_per_token),
                        f"{cost.ratio_to_dense:.1%}",
                    ]
                    for cost in d.densities
                ),
                f"What density does (levels {level_names(d.levels)})",
            )
        )
    if d.layer_levels:
        names = [level if level == "full" else f"{level} bits" for level in d.levels]
        blocks.append(
            table(
                ["layer", *names, "left out"],
                (
                    [str(of.layer), *(str(n) for n in (*of.neurons, of.left_out))]
                    for of in d.layer_levels
                ),
                f"Neurons by level at density {d.levels_density:g}, by the statistics alone",
            )
        )
    blocks += prior_report.tables(d.statistics)
    if d.note:
        blocks += [Text(), Text(f"Note: {d.note}.")]
    return Group(*blocks)


def _millions(n: int) -> str:
    return f"{n / 1e9:.2f} billion" if n >= 1e9 else f"{n / 1e6:.1f} million"


def render_plan(plan: MemoryPlan) -> Table:
    """A memory plan as a table for a terminal."""
    how = (
        f"FFN weights streamed, density {plan.density:g}"
        if plan.streamed
        else f"levels set once, when the model is loaded, density {plan.density:g}"
        if plan.set_once
        else "all weights in memory"
    )
    parts = [
        ("Python, libraries, vocabulary", plan.base),
        ("weights" if plan.whole else "weights without FFNs and embedding", plan.weights),
        ("rows of the embedding", plan.embedding),
        ("keys and values", plan.cache),
        ("computing", plan.compute),
        ("statistics", plan.statistics),
        ("FFN weights being read (pre-fill)", plan.streaming),
        ("FFN weights at their levels" if plan.set_once else "core set (decoding)", plan.core),
        ("most at once", plan.total),
    ]
    return table(
        ["part", "size"],
        ([name, mebibytes(size)] for name, size in parts if size),
        f"In {mebibytes(plan.budget)} ({plan.source}): {how}, {plan.n_ctx:,} tokens of context,"
        f" {plan.n_batch} at once",
    )


def render_gpu_plan(plan: GpuPlan) -> Table:
    """The plan of GPUs' memory as a table for a terminal, with main memory if that has a budget."""
    how = {
        "device": "with their FFNs",
        "host": f"FFNs in main memory, core sets of density {plan.density:g}",
        "file": f"FFNs in the file, core sets of density {plan.density:g}",
    }
    parts: list[tuple[str, str]] = [
        ("driver", "CUDA itself"),
        ("base", "Python, drivers, vocabulary"),
        ("weights", "weights"),
        ("embedding", "rows of the embedding"),
        ("cache", "keys and values"),
        ("compute", "computing"),
        ("statistics", "statistics"),
        ("streaming", "FFN weights being read (pre-fill)"),
        ("core", "core set"),
        ("total", "all"),
        ("budget", "budget"),
    ]
    places = [*plan.devices, *([plan.host] if plan.host is not None else [])]
    names = [f"{of.name}, {of.n_layers} layers" for of in plan.devices]
    rows = [
        [name, *(mebibytes(getattr(place, part, 0)) for place in places)]
        for part, name in parts
        if any(getattr(place, part, 0) for place in places)
    ]
    return table(
        ["part", *names, *(["main memory"] if plan.host is not None else [])],
        rows,
        f"{min(plan.n_gpu_layers, plan.n_layers)} of {plan.n_layers} layers on"
        f" {', '.join(of.name for of in plan.devices)} ({plan.devices[0].source}),"
        f" {how[plan.ffn]}, {plan.n_ctx:,} tokens of context, {plan.n_batch} at once",
    )
