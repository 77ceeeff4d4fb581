"""``coreinfer-edge inspect``: show what is in a model file."""

from __future__ import annotations

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
) -> None:
    """Show what is in a model file, and what density does to it."""
    from rich.console import Console

    from coreinfer_edge.inspect import describe, render
    from coreinfer_edge.model_source import resolve

    with stdout_kept_for_json(as_json):
        description = describe(resolve(model))
    if as_json:
        print_json(description.as_dict())
    else:
        Console(highlight=False).print(render(description))
