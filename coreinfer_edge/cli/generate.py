"""``coreinfer-edge generate``: continue a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from coreinfer_edge.cli.options import (
    AsJson,
    Context,
    Density,
    GpuLayers,
    Grammar,
    JsonSchema,
    KlTarget,
    Layers,
    MaxTokens,
    Memory,
    Model,
    Refresh,
    Repack,
    Seed,
    Stop,
    Strategy,
    Temperature,
    Threads,
    TopK,
    TopP,
    Verbose,
    Warmup,
    given_options,
    grammar_options,
    open_model,
    read_text,
)
from coreinfer_edge.cli.output import (
    figures_of,
    print_figures,
    print_json,
    print_pieces,
    reports_errors,
    stdout_kept_for_json,
)
from coreinfer_edge.errors import ArgumentError


@reports_errors
def generate(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The text to continue; - reads standard input.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Read the prompt from this file.", show_default=False)
    ] = None,
    density: Density = None,
    quality: KlTarget = None,
    strategy: Strategy = None,
    layers: Layers = None,
    warmup: Warmup = "auto",
    refresh: Refresh = None,
    memory: Memory = None,
    repack: Repack = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    context: Context = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    stop: Stop = None,
    grammar: Grammar = None,
    json_schema: JsonSchema = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Continue a text, and print it as it comes."""
    text = _read_prompt(prompt, file)
    sampling = given_options(temperature=temperature, top_p=top_p, top_k=top_k, stop=stop or None)
    sampling |= grammar_options(grammar, json_schema)
    with (
        stdout_kept_for_json(as_json),
        open_model(
            model,
            density,
            quality,
            strategy,
            layers,
            warmup,
            refresh,
            memory,
            repack,
            seed,
            context,
            threads,
            gpu_layers,
            verbose,
        ) as llm,
    ):
        if as_json:
            answer = llm.generate(text, max_tokens=max_tokens, **sampling)
        else:
            print_pieces(llm.stream(text, max_tokens=max_tokens, **sampling))
            print_figures(llm)
        result = figures_of(llm)
    if as_json:
        print_json({"model": model, "prompt": text, "text": answer, **result})


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if file is not None:
        if prompt is not None:
            raise typer.BadParameter("give a prompt or --file, not both")
        return read_text(file, "the prompt file")
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        try:
            return sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ArgumentError("the prompt on standard input is not UTF-8 text") from error
    if prompt is None:
        raise typer.BadParameter("give a prompt, --file, or a prompt on standard input")
    return prompt
