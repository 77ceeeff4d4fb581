"""``coreinfer-edge inspect``: show what is in a model file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coreinfer_edge.commands.options import (
    Model,
)
from coreinfer_edge.commands.output import (
    print_json,
    reports_errors,
    stdout_kept_for_json,
)


@reports_errors
def inspect(
    model: Model,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the description as one JSON object.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw what calibration says of the layers here.", show_default=False),
    ] = None,
) -> None:
    """Show what is in a model file, what density does to it, and what its statistics say."""
    from rich.console import Console

    from coreinfer_edge import prior_report, quality_report
    from coreinfer_edge.inspect import describe, render
    from coreinfer_edge.model_source import resolve

    if plot is not None:
        quality_report.check_plot(plot)
    with stdout_kept_for_json(as_json):
        description = describe(resolve(model))
    if plot is not None:
        prior_report.plot(description.statistics, plot)
    if as_json:
        print_json(description.as_dict())
    else:
        Console(highlight=False).print(render(description))
