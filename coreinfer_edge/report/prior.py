"""What the statistics in a model file say, for people: numbers, a table, a picture."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coreinfer_edge.choose.chooser import SENSITIVE
from coreinfer_edge.choose.prior import Gain, Prior, from_header
from coreinfer_edge.errors import ArgumentError, ModelFileError
from coreinfer_edge.model.header import GGUFHeader
from coreinfer_edge.report.plot import save_plot

if TYPE_CHECKING:
    from rich.table import Table

SHARES = (0.1, 0.2, 0.4)


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration says of one FFN.

    Attributes:
        layer: its number.
        energy: what part of the energy that the FFN puts out (mean squared activation times
            squared norm of the column of ffn_down) the strongest 10, 20 and 40 % of its neurons
            carry.
        sensitivity: KL divergence from dense to a model that keeps half of this FFN alone, in
            nats per token; None where not measured.
        zero_share: share of activations that are exactly 0; None where not counted.
    """

    layer: int
    energy: list[float]
    sensitivity: float | None
    zero_share: float | None


@dataclass(frozen=True)
class StatisticsReport:
    """What the statistics in a model file say.

    Attributes:
        tokens: of the calibration text.
        gradients: whether there are mean squared gradients.
        clusters: of the strategy ``similarity``.
        layers: one for each FFN.
        sensitive_layers: those whose halving costs more than SENSITIVE times the median.
        expected_kl: KL divergence from dense to core in nats per token by density, strategy
            ``energy``, measured at conversion on text held out of the statistics.
        gain: what the statistics are worth on text like and unlike the calibration's; None where
            not measured.
        problem: why there are none, or "".
    """

    tokens: int = 0
    gradients: bool = False
    clusters: int = 0
    layers: list[LayerStatistics] = field(default_factory=list)
    sensitive_layers: list[int] = field(default_factory=list)
    expected_kl: list[list[float]] = field(default_factory=list)
    gain: Gain | None = None
    problem: str = ""


def report(header: GGUFHeader) -> StatisticsReport:
    """Describe the prior in a model file; of a damaged one it says what is wrong."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prior = from_header(header)
    except ModelFileError as error:
        return StatisticsReport(problem=str(error))
    if prior is None:
        return StatisticsReport(problem=str(caught[0].message) if caught else "")
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
        gain=prior.gain,
    )


def gain_in_words(gain: Gain) -> str:
    """What the statistics are worth, in two sentences."""
    return (
        f"KL divergence to dense at density {gain.density:g} without and with the statistics:"
        f" {gain.own_without:.3f} and {gain.own_with:.3f} on text like the calibration text,"
        f" {gain.other_without:.3f} and {gain.other_with:.3f} on the reference of Python."
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
        zero_share=None if prior.zero_share is None else float(prior.zero_share[i]),
    )


def tables(statistics: StatisticsReport) -> list[Any]:
    """For a terminal; empty where there are no statistics."""
    from rich.table import Table
    from rich.text import Text

    if statistics.problem:
        return [Text(f"Note: {statistics.problem}")]
    if not statistics.layers:
        return []
    of = statistics
    gradients = "with" if of.gradients else "without"
    result: list[Any] = [_layer_table(of, Table), Text()]
    if of.sensitive_layers:
        result += [
            Text(
                "Sensitive (halving one costs more than"
                f" {SENSITIVE:g} times the median): {', '.join(map(str, of.sensitive_layers))}"
            ),
            Text(),
        ]
    if of.expected_kl:
        expected = Table(title="Expected KL divergence to dense", title_justify="left")
        for density, _ in of.expected_kl:
            expected.add_column(f"{density:g}", justify="right")
        expected.add_row(*(f"{kl:.2f}" for _, kl in of.expected_kl))
        result += [
            expected,
            Text(
                "in nats per token by density (strategy energy), measured at conversion on"
                " calibration text held out of the statistics; eval measures it on yours."
            ),
            Text(),
        ]
    if of.gain is not None:
        result += [Text(gain_in_words(of.gain)), Text()]
    result.append(
        Text(f"Of {of.tokens:,} tokens, {gradients} gradients, {of.clusters} clusters of texts.")
    )
    return result


def _layer_table(statistics: StatisticsReport, make: type[Table]) -> Table:
    first = statistics.layers[0]
    table = make(title="What calibration says", title_justify="left")
    table.add_column("layer", justify="right")
    for share in SHARES:
        table.add_column(f"energy in top {share:.0%}", justify="right")
    if first.sensitivity is not None:
        table.add_column("KL if halved", justify="right")
    has_zeros = any(layer.zero_share for layer in statistics.layers)  # ReLU
    if has_zeros:
        table.add_column("exact zeros", justify="right")
    for layer in statistics.layers:
        cells = [str(layer.layer), *(f"{share:.1%}" for share in layer.energy)]
        if layer.sensitivity is not None:
            cells.append(f"{layer.sensitivity:.4f}")
        if has_zeros:
            cells.append(f"{layer.zero_share or 0.0:.1%}")
        table.add_row(*cells)
    return table


def plot(statistics: StatisticsReport, path: Path) -> None:
    """Energy and sensitivity over the layers, expected KL divergence over density.

    Raises:
        ArgumentError: there are no statistics, or the picture cannot be written.
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
