"""Draws what the bytes of an FFN buy: KL divergence over bytes, for each way to spend them.

PYTHONPATH=. python tools/plot_frontier.py TEXT --model SmolLM2=model.gguf --plot docs/quality.png

measures levels, dropping, static and GRIFFIN at some densities, and uniform low bits, on windows of
the text; prints a table for each model, and draws one picture of all. With --figures they are kept
in a file, so that models can be measured one at a time and be drawn together.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from coreinfer_edge.choose.statistics import Level
from coreinfer_edge.measure.quality import (
    Evaluation,
    Quality,
    Setting,
    text_samples,
    uniform,
)
from coreinfer_edge.model.source import header_of
from coreinfer_edge.run.llm import EdgeLLM

DROPPING: tuple[Level, ...] = ("full",)

# Each is a line of the picture: its strategy, and its levels.
LINES: dict[str, tuple[str, tuple[Level, ...] | None]] = {
    "levels": ("energy", None),
    "levels, static": ("static", None),
    "dropping": ("energy", DROPPING),
    "dropping, static": ("static", DROPPING),
    "GRIFFIN": ("griffin", DROPPING),
}
UNIFORM: tuple[Level, ...] = (4, 3, 2)

# Points of each line of a model.
Lines = dict[str, list[dict[str, float]]]


def measured(
    path: Path, text: str, densities: list[float], windows: int, tokens: int
) -> dict[str, list[Quality]]:
    """The figures of each line of one model."""
    header = header_of(path)
    settings = [
        Setting(strategy, d, levels) for strategy, levels in LINES.values() for d in densities
    ]
    settings += map(uniform, UNIFORM)
    one = {"n_threads": 1, "n_threads_batch": 1}
    with EdgeLLM(header, strategy="dense", n_ctx=1024, **one) as llm:
        samples = text_samples(llm.llama, text, windows, 256, 0, tokens)
        with Evaluation(llm, header, settings, samples) as evaluation:
            qualities = iter(evaluation.measure().qualities)
    lines = {name: [next(qualities) for _ in densities] for name in LINES}
    return {**lines, "uniform 4, 3, 2 bits": sorted(qualities, key=lambda q: q.density)}


def figures_of(lines: dict[str, list[Quality]]) -> Lines:
    """What the table and the picture show."""
    return {
        name: [
            {
                "density": q.density,
                "kl": q.kl.mean,
                "low": q.kl.low,
                "high": q.kl.high,
                "same": q.agreement.mean,
                "perplexity": q.perplexity_ratio.mean,
            }
            for q in qualities
        ]
        for name, qualities in lines.items()
    }


def print_table(name: str, lines: Lines) -> None:
    """KL divergence by density, and in the bytes of uniform low bits."""
    *rows, (_, low) = lines.items()
    densities = [point["density"] for point in rows[0][1]]
    print(f"\n| {name} | " + " | ".join(f"{d:.2f}" for d in densities) + " |")
    print("|---" * (1 + len(densities)) + "|")
    for of, points in rows:
        print(f"| {of} | " + " | ".join(f"{point['kl']:.3f}" for point in points) + " |")
    for of, points in rows:
        for point in points:
            interval = f"({point['low']:.3f} .. {point['high']:.3f})"
            print(
                f"{of} {point['density']:.2f}: KL {point['kl']:.3f} {interval},"
                f" same token {point['same']:.1%}, perplexity x {point['perplexity']:.3f}"
            )
    for point in low:
        print(f"uniform low bits: {point['density']:.3f} of the bytes, KL {point['kl']:.3f}")


def draw(figures: dict[str, Lines], path: Path) -> None:
    figure = Figure(figsize=(5.2 * len(figures), 4.4), layout="constrained")
    all_axes = figure.subplots(1, len(figures), squeeze=False)[0]
    for axes, (name, lines) in zip(all_axes, figures.items(), strict=True):
        for line, points in lines.items():
            style = {"linestyle": ":", "marker": "s"} if "uniform" in line else {"marker": "o"}
            axes.plot(
                [p["density"] for p in points], [p["kl"] for p in points], label=line, **style
            )
        axes.set_title(name)
        axes.set_yscale("log")
        axes.set_xlabel("part of the FFN's bytes read per token")
        axes.grid(alpha=0.3, which="both")
    all_axes[0].set_ylabel("KL divergence to dense (nats per token)")
    all_axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--density", default="0.3,0.4,0.5,0.6,0.7,0.8")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--figures", type=Path, help="JSON: read, and written with new models")
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    densities = [float(d) for d in given.density.split(",")]
    figures: dict[str, Lines] = {}
    if given.figures is not None and given.figures.exists():
        figures = json.loads(given.figures.read_text())
    for name, path in (text.split("=", 1) for text in given.model):
        text = given.text.read_text(encoding="utf-8")
        lines = measured(Path(path), text, densities, given.windows, given.tokens)
        figures[name] = figures_of(lines)
        if given.figures is not None:
            given.figures.write_text(json.dumps(figures, indent=1))
    for name, of_model in figures.items():
        print_table(name, of_model)
    if given.plot is not None:
        draw(figures, given.plot)


if __name__ == "__main__":
    main()
