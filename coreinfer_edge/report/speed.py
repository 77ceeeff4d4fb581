"""Shows the results of ``bench``: tables for the terminal, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from coreinfer_edge.measure.speed import DENSE, SpeedReport
from coreinfer_edge.report.plot import save_plot
from coreinfer_edge.report.tables import table

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


def render(report: SpeedReport) -> Group:
    """The machine, the tables, missing engines and warnings."""
    from rich.console import Group, RenderableType
    from rich.text import Text

    machine = report.machine
    blocks: list[RenderableType] = [
        Text(
            f"{report.model} ({report.model_bytes / 2**20:,.0f} MiB)\n"
            f"{machine.processor}, {machine.threads} threads on {machine.cores} cores,"
            f" memory read at {machine.read_bytes_per_second / 1e9:.1f} GB/s,"
            f" last-level cache {machine.cache_bytes / 2**20:.0f} MiB"
            + ("\nseconds are the processor's, of one thread" if report.plan.processor_time else "")
        ),
        *([answer_table(report)] if report.answers else []),
        decode_table(report),
    ]
    blocks += [Text(f"not measured: {name}: {why}") for name, why in report.missing.items()]
    blocks += [Text(f"noisy: {warning}") for warning in report.warnings]
    if report.warnings:
        blocks.append(Text(f"other programs took {report.other_load:.0%} of the processor"))
    return Group(*blocks)


def answer_table(report: SpeedReport) -> Table:
    """One line for each engine."""
    plan = report.plan
    names = ("pre-fill tok/s", "first token s", "choice s", "decode tok/s", "spread", "speed-up")
    return table(
        ["engine", *names, "answer s", "peak MiB"],
        (
            [
                speed.engine,
                f"{speed.prefill_tokens_per_second:.1f}",
                f"{speed.first_token_seconds:.2f}",
                None if speed.choose_seconds is None else f"{speed.choose_seconds:.2f}",
                f"{speed.decode_tokens_per_second:.2f}",
                f"{speed.spread:.1%}",
                f"x {speed.speedup:.2f}",
                f"{speed.answer_seconds:.2f}",
                f"{speed.peak_memory_bytes / 2**20:,.0f}",
            ]
            for speed in report.answers
        ),
        f"Whole answers: {plan.prompt_tokens} tokens of prompt, {plan.tokens} of answer",
    )


def decode_table(report: SpeedReport) -> Table:
    """One line for each engine and length of context."""
    names = ("context", "tok/s", "spread", "MB/token", "of bandwidth", "speed-up", "bytes ratio")
    return table(
        ["engine", *names, "efficiency"],
        (
            [
                speed.engine,
                str(speed.context),
                f"{speed.tokens_per_second:.2f}",
                f"{speed.spread:.1%}",
                None if speed.bytes_per_token is None else f"{speed.bytes_per_token / 1e6:,.0f}",
                None if speed.bandwidth_share is None else f"{speed.bandwidth_share:.0%}",
                f"x {speed.speedup:.2f}",
                None if speed.bytes_ratio is None else f"x {speed.bytes_ratio:.2f}",
                None if speed.efficiency is None else f"{speed.efficiency:.3f}",
            ]
            for speed in report.decoding
        ),
        "Decoding alone",
    )


def plot(report: SpeedReport, path: Path) -> None:
    """Whole answers as bars, and speed-up over bytes ratio.

    Raises:
        ArgumentError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [speed.engine for speed in report.answers]
    rates = [speed.decode_tokens_per_second for speed in report.answers]
    bars = left.barh(names, rates)
    left.bar_label(bars, [f"{rate:.1f}" for rate in rates], padding=3)
    left.invert_yaxis()
    left.margins(x=0.15)
    left.set_xlabel("decode tokens per second, whole answers")
    most = 1.0
    for context in report.plan.contexts:
        points = [
            (speed.bytes_ratio, speed.speedup)
            for speed in report.decoding
            if speed.context == context and speed.bytes_ratio and speed.engine != DENSE
        ]
        most = max(most, *(ratio for ratio, _ in points))
        right.plot(*zip(*sorted(points), strict=True), marker="o", label=f"context {context}")
    right.plot([1, most], [1, most], color="grey", linestyle="--", label="all there is to gain")
    right.set_xlabel("bytes per token of dense over those of core")
    right.set_ylabel("speed-up of decoding")
    right.grid(alpha=0.3)
    right.legend()
    save_plot(figure, path)
