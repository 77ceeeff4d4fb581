"""Shows the statistics in a model file: sentences, tables, a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coreinfer_edge.choose.chooser import SENSITIVE
from coreinfer_edge.choose.prior import Gain
from coreinfer_edge.choose.statistics import level_names
from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.measure.description import SHARES, StatisticsReport
from coreinfer_edge.report.plot import save_plot
from coreinfer_edge.report.tables import table


def gain_in_words(gain: Gain) -> str:
    """The gain of the statistics in a sentence."""
    return (
        f"KL divergence to dense at density {gain.density:g} without and with the statistics:"
        f" {gain.own_without:.3f} and {gain.own_with:.3f} on text like the calibration text,"
        f" {gain.other_without:.3f} and {gain.other_with:.3f} on the reference of Python."
    )


def tables(statistics: StatisticsReport) -> list[Any]:
    """Tables and texts for a terminal; empty without statistics."""
    from rich.text import Text

    if statistics.problem:
        return [Text(f"Note: {statistics.problem}")]
    if not statistics.layers:
        return []
    of = statistics
    has_zeros = any(layer.zero_share for layer in of.layers)  # ReLU
    of_layers = table(
        [
            "layer",
            *(f"energy in top {share:.0%}" for share in SHARES),
            "KL if halved",
            "KL at 2 bits",
            "exact zeros",
        ],
        (
            [
                str(layer.layer),
                *(f"{share:.1%}" for share in layer.energy),
                None if layer.sensitivity is None else f"{layer.sensitivity:.4f}",
                None if layer.low_bits_loss is None else f"{layer.low_bits_loss:.4f}",
                f"{layer.zero_share or 0.0:.1%}" if has_zeros else None,
            ]
            for layer in of.layers
        ),
        "What calibration says",
    )
    result: list[Any] = [of_layers]
    if of.sensitive_layers:
        result += [
            Text(
                "Sensitive (halving one costs more than"
                f" {SENSITIVE:g} times the median): {', '.join(map(str, of.sensitive_layers))}"
            ),
            Text(),
        ]
    if of.expected_kl:
        result += [
            table(
                ["density", *(f"{density:g}" for density, _ in of.expected_kl)],
                [["KL", *(f"{kl:.2f}" for _, kl in of.expected_kl)]],
                "Expected KL divergence to dense",
            ),
            Text(
                "in nats per token by density (strategy energy, levels"
                f" {level_names(of.expected_levels)}), measured at conversion on calibration text"
                " held out of the statistics; eval measures it on yours."
            ),
            Text(),
        ]
    if of.gain is not None:
        result += [Text(gain_in_words(of.gain)), Text()]
    gradients = "with" if of.gradients else "without"
    result.append(
        Text(f"Of {of.tokens:,} tokens, {gradients} gradients, {of.clusters} clusters of texts.")
    )
    return result


def plot(statistics: StatisticsReport, path: Path) -> None:
    """Energy and sensitivity over the layers, expected KL divergence over density.

    Raises:
        ArgumentError: the model has no statistics, or the plot cannot be written.
    """
    from matplotlib.figure import Figure

    if not statistics.layers:
        raise ArgumentError(
            statistics.problem
            or "the model has no statistics to plot: add them with coreinfer-edge convert"
        )
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    numbers = [layer.layer for layer in statistics.layers]
    for i, share in enumerate(SHARES):
        energies = [layer.energy[i] for layer in statistics.layers]
        left.plot(numbers, energies, marker=".", label=f"top {share:.0%}")
    left.set_ylim(0, 1)
    left.set_ylabel("share of the energy")
    left.legend()
    if statistics.layers[0].sensitivity is not None:
        middle.bar(numbers, [layer.sensitivity or 0.0 for layer in statistics.layers])
    middle.set_ylabel("KL divergence if halved (nats per token)")
    for axes in (left, middle):
        axes.set_xlabel("layer")
    if statistics.expected_kl:
        right.plot(*zip(*statistics.expected_kl, strict=True), marker="o")
    right.set_xlabel("density")
    right.set_ylabel("expected KL divergence (nats per token)")
    save_plot(figure, path)
