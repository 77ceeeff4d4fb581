"""``coreinfer-edge generate``: continue a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from coreinfer_edge.cli.options import (
    AnswerOptions,
    AsJson,
    Model,
    Verbose,
    takes_options,
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
@takes_options
def generate(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The text to continue; - reads standard input.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Read the prompt from this file.", show_default=False)
    ] = None,
    *,
    options: AnswerOptions,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Continue a text, and print it as it comes."""
    text = _read_prompt(prompt, file)
    sampling = options.sampling()
    with stdout_kept_for_json(as_json), options.open_model(model, verbose) as llm:
        if as_json:
            answer = llm.generate(text, **sampling)
        else:
            print_pieces(llm.stream(text, **sampling))
            print_figures(llm)
        result = figures_of(llm)
    if as_json:
        print_json({"model": model, "prompt": text, "text": answer, **result})


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if file is not None:
        if prompt is not None:
            raise typer.BadParameter("give a prompt or --file, not both")
        from coreinfer_edge.run.arguments import read_text

        return read_text(file, "the prompt file")
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        try:
            return sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ArgumentError("the prompt on standard input is not UTF-8 text") from error
    if prompt is None:
        raise typer.BadParameter("give a prompt, --file, or a prompt on standard input")
    return prompt
