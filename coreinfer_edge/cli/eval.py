"""``coreinfer-edge eval``: measure the quality of core sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coreinfer_edge.cli.options import (
    GpuLayers,
    KlTarget,
    Layers,
    Model,
    Plot,
    Refresh,
    ResultsAsJson,
    Threads,
    Verbose,
    given_options,
    parse_densities,
    parse_levels,
    parse_list,
    parse_warmup,
)
from coreinfer_edge.cli.output import (
    print_json,
    print_table,
    progress_bar,
    reports_errors,
    stdout_kept_for_json,
)

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from coreinfer_edge.measure.quality import Setting
    from coreinfer_edge.measure.task import TaskQuality
    from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.errors import ArgumentError


@reports_errors
def evaluate(
    model: Model,
    text: Annotated[
        Path | None,
        typer.Option(help="Measure on windows of this text.", show_default="our chat prompts"),
    ] = None,
    task: Annotated[
        Path | None,
        typer.Option(
            help="Measure free generation on this .jsonl with prompts and references.",
            show_default=False,
        ),
    ] = None,
    density: Annotated[
        Any,
        typer.Option(parser=parse_densities, metavar="LIST", help="Densities, with commas; auto."),
    ] = "0.5",
    strategy: Annotated[
        Any, typer.Option(parser=parse_list, metavar="LIST", help="Strategies, with commas.")
    ] = "energy",
    levels: Annotated[
        list[Any] | None,
        typer.Option(
            parser=parse_levels,
            metavar="LIST",
            help="Precisions that a neuron can have: full, and 4, 3 and 2 bits, with commas."
            " Repeatable.",
            show_default="all that there are here",
        ),
    ] = None,
    uniform: Annotated[
        Any,
        typer.Option(
            parser=parse_levels,
            metavar="LIST",
            help="Also measure all neurons at 4, 3 or 2 bits, as in a smaller file.",
            show_default=False,
        ),
    ] = None,
    quality: KlTarget = None,
    layers: Layers = None,
    refresh: Refresh = None,
    warmup: Annotated[
        Any,
        typer.Option(
            parser=parse_warmup,
            metavar="TOKENS|auto",
            help="Tokens to decode dense before the choice.",
            show_default="0 with --text, auto without",
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 24,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a window's prompt.")] = 256,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to decode with the core set; with --task the most.")
    ] = 128,
    turns: Annotated[
        int,
        typer.Option(
            min=1,
            max=2,
            help="With 2, measure the second answers of chats whose first ones were decoded with"
            " the first density and strategy.",
        ),
    ] = 1,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Also show the KL that density auto estimates.")
    ] = False,
    plot: Plot = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    as_json: ResultsAsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure the quality of core sets, compared with the dense model.

    Prompts are pre-filled dense, and continuations are decoded with the core set, with the true
    next token at each step. The probabilities of the next token are compared with those of the
    dense model. Continuations come from --text, or are the dense model's own answers to chat
    prompts.
    """
    from coreinfer_edge.measure import quality as ev
    from coreinfer_edge.model.source import header_of
    from coreinfer_edge.report import quality as quality_report
    from coreinfer_edge.report.plot import check_plot
    from coreinfer_edge.run.arguments import read_text
    from coreinfer_edge.run.llm import EdgeLLM
    from coreinfer_edge.run.options import QUALITY, Options
    from coreinfer_edge.run.session import auto_warmup

    if text is not None and task is not None:
        raise typer.BadParameter("give --text or --task, not both")
    if task is not None and (plot is not None or estimate):
        raise typer.BadParameter("--plot and --estimate do not go with --task")
    if turns > 1 and (text is not None or task is not None):
        raise typer.BadParameter("--turns goes with neither --text nor --task")
    settings = [
        ev.Setting(of, share, precisions and tuple(precisions))
        for of in strategy
        for precisions in levels or [None]
        for share in density
    ]
    if not settings:
        raise typer.BadParameter("give at least one density and one strategy")
    if uniform and (task is not None or "full" in uniform):
        raise typer.BadParameter("--uniform takes 4, 3 and 2 (bits), and goes not with --task")
    if warmup is None:
        warmup = 0 if text is not None else "auto"
    if text is not None and warmup == "auto":
        warmup = auto_warmup(prompt_tokens)
    for setting in settings:
        if setting.strategy == "dense":
            raise typer.BadParameter("the others are compared with dense: leave dense out")
        Options(
            setting.density,
            setting.strategy,
            warmup,
            quality=quality if setting.density == "auto" else None,
            refresh=refresh,
            levels=setting.levels,
        ).check()
    if quality is not None and "auto" not in density:
        raise ArgumentError("quality is what density='auto' keeps to: add it to the densities")
    settings += map(ev.uniform, uniform or [])
    check_plot(plot)
    options = given_options(n_threads=threads, n_threads_batch=threads)
    options |= {"n_gpu_layers": gpu_layers, "verbose": verbose}
    with stdout_kept_for_json(as_json):
        header = header_of(model)
        choice = {"layers": layers, "refresh": refresh, "warmup": warmup, **options}

        def open_model(setting: ev.Setting) -> EdgeLLM:
            return EdgeLLM(
                header,
                setting.density,
                setting.strategy,
                quality=quality if setting.density == "auto" else None,
                levels=setting.levels,
                **choice,
            )

        if task is not None:
            results = _measure_task(task, open_model, settings, tokens)
            figures: dict[str, Any] = {"task": [dataclasses.asdict(result) for result in results]}
            shown: Group | Table = quality_report.task_table(results)
        else:
            given = None if text is None else read_text(text, "the text")
            options["n_ctx"] = choice["n_ctx"] = 1024 + turns * tokens
            with EdgeLLM(header, strategy="dense", **options) as llm:
                if given is not None:
                    samples = ev.text_samples(
                        llm.llama, given, windows, prompt_tokens, warmup, tokens
                    )
                else:
                    if llm.llama.why_no_chat is not None:
                        raise ArgumentError(
                            "this model has no chat template that eval's prompts can be written"
                            " with: measure on a text, with --text FILE"
                        )
                    with (
                        progress_bar("the dense model answers", len(ev.CHAT_PROMPTS)) as advance,
                        open_model(settings[0]) if turns > 1 else nullcontext() as before,
                    ):
                        samples = ev.chat_samples(
                            llm,
                            warmup,
                            tokens,
                            ev.CHAT_PROMPTS,
                            lambda: advance(1),
                            first=before,
                        )
                with (
                    ev.Evaluation(
                        llm,
                        header,
                        settings,
                        samples,
                        layers,
                        refresh,
                        QUALITY if quality is None else quality,
                        estimate,
                    ) as evaluation,
                    progress_bar("measuring", len(samples) * len(settings)) as advance,
                ):
                    report = evaluation.measure(lambda: advance(1))
            figures, shown = dataclasses.asdict(report), quality_report.render(report)
            if plot is not None:
                quality_report.plot(report, plot)
    if as_json:
        print_json({"model": model, **figures})
    else:
        print_table(shown)


def _measure_task(
    file: Path,
    open_model: Callable[[Setting], EdgeLLM],
    settings: list[Setting],
    max_tokens: int,
) -> list[TaskQuality]:
    from coreinfer_edge.measure.task import measure_task, read_task

    items = read_task(file)
    with progress_bar("answering", len(items) * (1 + len(settings))) as advance:
        return measure_task(open_model, items, settings, max_tokens, lambda: advance(1))
