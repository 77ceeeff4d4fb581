"""``coreinfer-edge inspect``: describe a model file."""

from __future__ import annotations

from typing import Annotated

import typer

from coreinfer_edge.cli.options import (
    Context,
    Density,
    GpuMemory,
    Levels,
    Memory,
    Model,
    Plot,
    Rpc,
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
    gpu_memory: GpuMemory = None,
    rpc: Rpc = None,
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
    from coreinfer_edge.measure.description import LEVELS_DENSITY, describe
    from coreinfer_edge.model.source import header_of
    from coreinfer_edge.report import prior as prior_report
    from coreinfer_edge.report.inspect import render, render_gpu_plan, render_plan
    from coreinfer_edge.report.plot import check_plot
    from coreinfer_edge.run.arguments import check_density

    check_plot(plot)
    if density is not None:
        check_density(density)
    plan = None
    with stdout_kept_for_json(as_json):
        header = header_of(model)
        of_layers = density if isinstance(density, float) else LEVELS_DENSITY
        description = describe(header, levels=levels, levels_density=of_layers)
        options = given_options(n_ctx=context, n_threads=threads, n_threads_batch=threads)
        if memory is not None and gpu_memory is None:
            from coreinfer_edge.run.load_plan import plan_memory

            plan = plan_memory(
                header, memory, density, strategy, **options, **given_options(levels=levels)
            )
        gpu_plan = None
        if gpu_memory is not None:
            from coreinfer_edge.run.load_plan import plan_gpu_memory

            gpu_plan = plan_gpu_memory(
                header,
                gpu_memory,
                density,
                rpc=rpc or (),
                **options,
                **given_options(levels=levels, memory=memory),
            )
    if plot is not None:
        prior_report.plot(description.statistics, plot)
    if as_json:
        plans = {"plan": plan, "gpu_plan": gpu_plan}
        made = {name: plan.as_dict() for name, plan in plans.items() if plan}
        print_json(description.as_dict() | made)
        return
    print_table(render(description))
    if plan:
        print_table(render_plan(plan))
    if gpu_plan:
        print_table(render_gpu_plan(gpu_plan))
