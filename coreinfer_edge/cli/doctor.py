"""``coreinfer-edge doctor``: what this device is, what it can run, and what is wrong with it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from coreinfer_edge.cli.options import Rpc, Threads
from coreinfer_edge.cli.output import (
    print_json,
    print_table,
    reports_errors,
    stdout_kept_for_json,
)


@reports_errors
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="A .gguf file, demo, or hf://org/repo/file.gguf.", show_default=False),
    ] = None,
    memory: Annotated[
        str, typer.Option(metavar="SIZE|auto", help="The memory to plan for, like 1.5GiB.")
    ] = "auto",
    threads: Threads = None,
    rpc: Rpc = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure nothing; no speeds then.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print the report as one JSON object, for bug reports: no path and no name of a"
            " user or host is in it.",
        ),
    ] = False,
) -> None:
    """Say what this device is, what it can run and how fast, and what is wrong with it.

    With a model: how that one would run, and how fast it is, if trying it is quick.
    """
    from coreinfer_edge.binding.core import add_rpc_server
    from coreinfer_edge.doctor.report import examine
    from coreinfer_edge.model.source import header_of
    from coreinfer_edge.report.doctor import render

    with stdout_kept_for_json(as_json):
        for address in rpc or ():
            add_rpc_server(address)
        header = None if model is None else header_of(model)
        report = examine(header, threads, memory, quick, _say)
    if as_json:
        print_json(report.as_dict())
    else:
        print_table(render(report))


def _say(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)
