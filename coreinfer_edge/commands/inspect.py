"""``coreinfer-edge inspect``: show what is in a model file."""

from __future__ import annotations

from typing import Annotated

import typer

from coreinfer_edge.commands.options import (
    Context,
    Density,
    Memory,
    Model,
    Threads,
    given_options,
)
from coreinfer_edge.commands.output import (
    print_json,
    reports_errors,
    stdout_kept_for_json,
)


@reports_errors
def inspect(
    model: Model,
    memory: Memory = None,
    density: Density = None,
    context: Context = None,
    threads: Threads = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the description as one JSON object.")
    ] = False,
) -> None:
    """Show what is in a model file, what density does to it, and the plan for a memory."""
    from rich.console import Console

    from coreinfer_edge.inspect import describe, render
    from coreinfer_edge.model_source import resolve

    plan = None
    with stdout_kept_for_json(as_json):
        path = resolve(model)
        description = describe(path)
        if memory is not None:
            from coreinfer_edge.edge import plan_memory

            options = given_options(n_ctx=context, n_threads=threads, n_threads_batch=threads)
            plan = plan_memory(path, memory, density, **options)
    if as_json:
        print_json(description.as_dict() | ({"plan": plan.as_dict()} if plan else {}))
        return
    console = Console(highlight=False)
    console.print(render(description))
    if plan:
        from coreinfer_edge.memory_plan import render as render_plan

        console.print()
        console.print(render_plan(plan))
