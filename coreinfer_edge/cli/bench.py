"""``coreinfer-edge bench``: measure speed, dense, core and other engines side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from coreinfer_edge.cli.options import (
    GpuLayers,
    Levels,
    Plot,
    Repack,
    ResultsAsJson,
    Strategy,
    Threads,
    Warmup,
    parse_list,
)
from coreinfer_edge.cli.output import (
    print_json,
    print_table,
    progress_bar,
    reports_errors,
    stdout_kept_for_json,
)


def parse_numbers(text: str) -> list[int]:
    items = parse_list(text)
    if not items or not all(item.isdecimal() and int(item) > 0 for item in items):
        raise typer.BadParameter("numbers of tokens, with commas")
    return [int(item) for item in items]


def parse_shares(text: str) -> list[float]:
    try:
        return [float(item) for item in parse_list(text)]
    except ValueError:
        raise typer.BadParameter("densities, with commas") from None


@reports_errors
def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="A .gguf file, demo, or hf://org/repo/file.gguf.", show_default=False),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Instead of a model: random weights in the shape of a Llama, 1b (3.2), 3b (3.2),"
            " 7b (2) or 8b (3).",
            show_default=False,
        ),
    ] = None,
    type_: Annotated[str, typer.Option("--type", help="Its weights: q4_0, q4_k, ...")] = "q4_0",
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps it.", show_default="the platform's cache folder"),
    ] = None,
    density: Annotated[
        Any, typer.Option(parser=parse_shares, metavar="LIST", help="Densities, with commas.")
    ] = "0.2,0.4,0.6,0.8",
    vs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENGINE",
            help="Another engine: llama.cpp or transformers, with its own options after it"
            " (,KEY=VALUE). Repeatable.",
            show_default=False,
        ),
    ] = None,
    vs_python: Annotated[
        str | None,
        typer.Option(
            metavar="PROGRAM", help="The Python with those engines.", show_default="this one"
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 256,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 128,
    contexts: Annotated[
        Any,
        typer.Option(
            parser=parse_numbers, metavar="LIST", help="Contexts to decode at, with commas."
        ),
    ] = "256,1024",
    answers: Annotated[
        bool, typer.Option(help="Measure whole answers too; without, only decoding alone.")
    ] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Number of turns of each.")] = 7,
    repeats: Annotated[int, typer.Option(min=0, help="Most repeats of a noisy measurement.")] = 2,
    processor_time: Annotated[
        bool,
        typer.Option(
            "--processor-time",
            help="Measure the processor's time of one thread, for a busy machine.",
        ),
    ] = False,
    strategy: Strategy = None,
    levels: Levels = None,
    warmup: Warmup = "auto",
    plot: Plot = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    repack: Repack = None,
    as_json: ResultsAsJson = False,
) -> None:
    """Measure speed: dense, core sets and other engines take turns in one run.

    Shows whole answers (pre-fill, choice, decoding), decoding alone, and the bytes that a token
    reads. Efficiency is the speed-up over dense with the same kernels, divided by the ratio of
    these bytes.
    """
    from coreinfer_edge.measure.baselines import wanted_baselines
    from coreinfer_edge.measure.speed import Plan, SpeedRun
    from coreinfer_edge.model.source import resolve
    from coreinfer_edge.report import speed as bench_report
    from coreinfer_edge.report.plot import check_plot

    if (model is None) == (shape is None):
        raise typer.BadParameter("give a model or --shape")
    if not density:
        raise typer.BadParameter("give at least one density")
    check_plot(plot)
    plan = Plan(
        densities=density,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        contexts=sorted(set(contexts)),
        rounds=rounds,
        repeats=repeats,
        strategy=strategy or "energy",
        warmup=warmup,
        threads=threads,
        gpu_layers=gpu_layers,
        repack=repack,
        levels=levels and tuple(levels),
        answers=answers,
        processor_time=processor_time,
    )
    with stdout_kept_for_json(as_json):
        path = resolve(model) if model is not None else _random_model(shape or "", type_, cache)
        baselines = wanted_baselines(vs or [], path, vs_python)
        run = SpeedRun(path, plan, baselines)
        with progress_bar("measuring", run.steps) as advance:
            report = run.measure(lambda: advance(1))
    if plot is not None:
        bench_report.plot(report, plot)
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        print_table(bench_report.render(report))


def _random_model(shape: str, type_: str, cache: Path | None) -> Path:
    from coreinfer_edge.measure.random_llama import cached_model

    return cached_model(shape, type_, cache, lambda n: progress_bar("making the model, bytes", n))
