"""``coreinfer-edge inspect``: describe a model file."""

from __future__ import annotations

from typing import Annotated

import typer

from coreinfer_edge.cli.options import (
    Context,
    Density,
    Levels,
    Memory,
    Model,
    Plot,
    Strategy,
    Threads,
    given_options,
)
from coreinfer_edge.cli.output import (
    print_json,
    print_table,
    reports_errors,
    stdout_kept_for_json,
)


@reports_errors
def inspect(
    model: Model,
    memory: Memory = None,
    density: Density = None,
    levels: Levels = None,
    strategy: Strategy = None,
    context: Context = None,
    threads: Threads = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the description as one JSON object.")
    ] = False,
    plot: Plot = None,
) -> None:
    """Show a model file's contents, the effect of density, statistics, and a memory plan."""
    from coreinfer_edge.measure.description import describe
    from coreinfer_edge.model.source import header_of
    from coreinfer_edge.report import prior as prior_report
    from coreinfer_edge.report.inspect import render, render_plan
    from coreinfer_edge.report.plot import check_plot

    check_plot(plot)
    plan = None
    with stdout_kept_for_json(as_json):
        header = header_of(model)
        description = describe(header)
        if memory is not None:
            from coreinfer_edge.run.llm import plan_memory

            options = given_options(
                n_ctx=context, n_threads=threads, n_threads_batch=threads, levels=levels
            )
            plan = plan_memory(header, memory, density, strategy, **options)
    if plot is not None:
        prior_report.plot(description.statistics, plot)
    if as_json:
        print_json(description.as_dict() | ({"plan": plan.as_dict()} if plan else {}))
        return
    print_table(render(description))
    if plan:
        print_table(render_plan(plan))
