"""Shows the results of ``eval``: tables for the terminal, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coreinfer_edge.choose.statistics import level_names
from coreinfer_edge.measure.quality import UNIFORM, Quality, Report
from coreinfer_edge.measure.task import TaskQuality
from coreinfer_edge.report.plot import save_plot
from coreinfer_edge.report.tables import table

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


def _asked(density: float | str) -> str:
    return density if isinstance(density, str) else f"{density:g}"


def render(report: Report) -> Group:
    """One line for each setting; intervals are 95 %."""
    from rich.console import Group, RenderableType
    from rich.text import Text

    names = ("density", "kept", "KL to dense", "95 %", "same token", "perplexity", "KL estimated")
    settings = table(
        ["strategy", "levels", *names],
        (
            [
                quality.strategy,
                level_names(quality.levels),
                None if quality.strategy == UNIFORM else _asked(quality.density_asked),
                f"{quality.density:.3f}",
                f"{quality.kl.mean:.3f}",
                f"{quality.kl.low:.3f} .. {quality.kl.high:.3f}",
                f"{quality.agreement.mean:.1%}",
                f"x {quality.perplexity_ratio.mean:.3f}",
                None if quality.estimated_kl is None else f"{quality.estimated_kl:.3f}",
            ]
            for quality in report.qualities
        ),
    )
    blocks: list[RenderableType] = [settings]
    if (rank := report.rank_correlation) is not None:
        blocks.append(Text(f"rank correlation of estimated and measured KL: {rank:.2f}"))
    return Group(*blocks)


def task_table(results: Sequence[TaskQuality]) -> Table:
    """One line for each setting, dense first; intervals are 95 %."""
    names = ("density", "in use", "ROUGE-L", "95 %", "of dense", "ROUGE-L to dense")
    return table(
        ["strategy", "levels", *names],
        (
            [
                quality.strategy,
                level_names(quality.levels),
                _asked(quality.density_asked),
                f"{quality.density:.3f}",
                f"{quality.rouge_l.mean:.3f}",
                f"{quality.rouge_l.low:.3f} .. {quality.rouge_l.high:.3f}",
                None if quality.kept is None else f"{quality.kept:.1%}",
                f"{quality.rouge_l_to_dense:.3f}",
            ]
            for quality in results
        ),
    )


def plot(report: Report, path: Path) -> None:
    """KL divergence and agreement over density, one line for each strategy and its levels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines: dict[str, list[Quality]] = {}
    for quality in sorted(report.qualities, key=lambda q: q.density):
        name = " ".join((quality.strategy, level_names(quality.levels)))
        lines.setdefault(name, []).append(quality)
    for strategy, of_strategy in lines.items():
        densities = [q.density for q in of_strategy]
        for axes, intervals in (
            (left, [q.kl for q in of_strategy]),
            (right, [q.agreement for q in of_strategy]),
        ):
            means = [interval.mean for interval in intervals]
            spread = [
                [interval.mean - interval.low for interval in intervals],
                [interval.high - interval.mean for interval in intervals],
            ]
            axes.errorbar(densities, means, yerr=spread, marker="o", capsize=2, label=strategy)
    left.set_ylabel("KL divergence to dense (nats per token)")
    left.set_yscale("symlog", linthresh=0.1)
    right.set_ylabel("same most likely token")
    right.set_ylim(0, 1)
    for axes in (left, right):
        axes.set_xlabel("density")
        axes.grid(alpha=0.3)
    left.legend()
    save_plot(figure, path)
