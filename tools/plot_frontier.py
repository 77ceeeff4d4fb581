"""Draws what the bytes of an FFN buy: KL divergence over bytes, for each way to spend them.

PYTHONPATH=. python tools/plot_frontier.py TEXT --model SmolLM2=model.gguf --plot docs/quality.png

measures levels, dropping, static and GRIFFIN at some densities, and uniform low bits, on windows of
the text; prints a table for each model, and draws one picture of all.
"""

from __future__ import annotations

import argparse
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


def print_table(name: str, lines: dict[str, list[Quality]], densities: list[float]) -> None:
    """KL divergence by density, and the bytes of uniform low bits."""
    *rows, (_, low) = lines.items()
    print(f"\n| {name} | " + " | ".join(f"{d:g}" for d in densities) + " |")
    print("|---" * (1 + len(densities)) + "|")
    for of, qualities in rows:
        print(f"| {of} | " + " | ".join(f"{q.kl.mean:.3f}" for q in qualities) + " |")
    for q in low:
        print(f"uniform {q.levels[0]} bits: {q.density:.3f} of the bytes, KL {q.kl.mean:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--density", default="0.3,0.4,0.5,0.6,0.7,0.8")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    densities = [float(d) for d in given.density.split(",")]
    models = dict(text.split("=", 1) for text in given.model)
    figure = Figure(figsize=(5.2 * len(models), 4.4), layout="constrained")
    all_axes = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, (name, path) in zip(all_axes, models.items(), strict=True):
        text = given.text.read_text(encoding="utf-8")
        lines = measured(Path(path), text, densities, given.windows, given.tokens)
        print_table(name, lines, densities)
        for line, qualities in lines.items():
            style = {"linestyle": ":", "marker": "s"} if "uniform" in line else {"marker": "o"}
            points = [(q.density, q.kl.mean) for q in qualities]
            axes.plot(*zip(*points, strict=True), label=line, **style)
        axes.set_title(name)
        axes.set_yscale("log")
        axes.set_xlabel("part of the FFN's bytes read per token")
        axes.grid(alpha=0.3, which="both")
    all_axes[0].set_ylabel("KL divergence to dense (nats per token)")
    all_axes[0].legend(fontsize="small")
    if given.plot is not None:
        figure.savefig(given.plot, dpi=110)


if __name__ == "__main__":
    main()
