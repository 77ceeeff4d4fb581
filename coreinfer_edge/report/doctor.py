"""Shows the report of ``doctor``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from coreinfer_edge.choose.statistics import level_names
from coreinfer_edge.doctor.device import Device
from coreinfer_edge.doctor.gpus import OnGpus
from coreinfer_edge.doctor.models import Prediction
from coreinfer_edge.doctor.report import DoctorReport, ModelReport
from coreinfer_edge.report.inspect import render_gpu_plan, render_plan
from coreinfer_edge.report.tables import table

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


def render(report: DoctorReport) -> Group:
    """The device, what it can run, and what is wrong."""
    from rich.console import Group, RenderableType
    from rich.text import Text

    blocks: list[RenderableType] = [_facts(report)]
    if report.models:
        title = f"What it can run, as memory={report.memory!r} plans it"
        blocks.append(models_table(report.models, title))
        blocks.append(Text(_RUNS, style="dim"))
        if report.device.gpus:
            blocks.append(Text(_ON_GPUS, style="dim"))
    if report.model:
        blocks += _of_model(report.model)
    blocks.append(Text())
    if not report.findings:
        blocks.append(Text("Nothing is wrong.", style="bold green"))
    for finding in report.findings:
        style = "bold red" if finding.kind == "problem" else "bold"
        blocks.append(
            Text.assemble((f"{finding.kind}: ", style), f"{finding.what}.\n    -> {finding.do}")
        )
    return Group(*blocks)


def _facts(report: DoctorReport) -> Table:
    from rich.table import Table
    from rich.text import Text

    device, rates = report.device, report.rates
    rows = [
        ("Device", device.board),
        ("Processor", f"{device.processor} ({device.machine}), {_cores(device)}"),
        ("Instructions", ", ".join(device.instructions)),
        ("Our kernels", _kernels(device)),
        ("llama.cpp's kernels", ", ".join(device.ggml)),
        ("Memory", _memory(device)),
        ("GPU", _gpus(device)),
    ]
    if rates is not None:
        rates_of = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in rates.weights.items())
        rows += [
            ("Memory is read at", f"{rates.memory / 1e9:.1f} GB/s with {report.threads} threads"),
            ("Weights are read at", f"{rates_of} GB/s"),
            (
                "Besides",
                f"a layer takes {rates.layer_seconds * 1e6:.0f} µs, 1,000 tokens of vocabulary"
                f" {rates.entry_seconds * 1e9:.0f} µs",
            ),
        ]
        if report.disk:
            speed = f"{report.disk.bytes_per_second / 1e6:,.0f} MB/s"
            rows.append(("The disk is read at", f"{speed} ({report.disk.file}, {report.disk.how})"))
    rows.append(("System", f"{device.system}, Python {device.python}, {report.version}"))
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in rows:
        if value:
            facts.add_row(name, Text("".join(c for c in value if c.isprintable())))
    return facts


def _cores(device: Device) -> str:
    quota = f", the time of {device.cpu_quota:g}" if device.cpu_quota is not None else ""
    allowed = device.allowed_cores
    cores = f"{device.cores} cores"
    return (cores if allowed == device.cores else f"{allowed} of {cores} allowed") + quota


def _kernels(device: Device) -> str:
    others = [name for name in device.our_kernels if name != device.kernels]
    return device.kernels + (f" in use (also here: {', '.join(others)})" if others else "")


def _memory(device: Device) -> str:
    total = f"{_size(device.memory_bytes)}, " if device.memory_bytes else ""
    limit = "" if device.memory_limit == "machine" else f" (the {device.memory_limit})"
    swap = (
        f", {_size(device.swap_used_bytes)} of {_size(device.swap_bytes)} of swap used"
        if device.swap_bytes
        else ", no swap"
    )
    return f"{total}{_size(device.available_bytes)} available{limit}{swap}"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


def _gpus(device: Device) -> str:
    found = [
        f"{gpu.description or gpu.name}, {_size(gpu.free_bytes)} of {_size(gpu.memory_bytes)} free"
        for gpu in device.gpus
    ]
    return "; ".join(found) or "none that this build can use"


# What the column "runs" says.
_RUNS = (
    "whole: in memory; streams 0.7: the FFN stays on the disk, each prompt reads it (prompt +), and"
    " answers read 0.7 of it; levels 0.9: set when it is loaded; poor: the text suffers much."
)


_ON_GPUS = (
    "GPU, by the sizes alone (doctor MODEL plans): core 0.8: its FFNs are in main memory, and core"
    " sets of density 0.8 on the GPU; part: some of its layers. tok/s are the processor's: how fast"
    " the GPU is was not measured."
)


def models_table(models: Sequence[Prediction], title: str) -> Table:
    """A row for each model: how it runs, and how fast."""
    return table(
        ["model", "size", "runs", "context", "memory", "tok/s", "prompt +", "GPU"],
        (
            [
                f"{model.size} {model.type}".strip(),
                _size(model.file_bytes),
                _runs(model),
                f"{model.context:,}" if model.context else None,
                _size(model.memory_bytes) if model.memory_bytes else None,
                speed(model.tokens_per_second),
                f"{model.prompt_read_seconds:.1f} s" if model.prompt_read_seconds else None,
                _on_gpus(model.on_gpus),
            ]
            for model in models
        ),
        title,
    )


def _runs(model: Prediction) -> str:
    if model.runs in ("whole", "refused"):
        return model.runs
    how = "poor" if model.is_poor else "levels" if model.runs == "set once" else "streams"
    return f"{how} {model.density:.2f}"


def _on_gpus(model: OnGpus | None) -> str | None:
    if model is None:
        return None
    return f"core {model.density:.2f}" if model.runs == "core sets" else model.runs


def speed(tokens_per_second: float | None) -> str | None:
    if tokens_per_second is None:
        return None
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 20 else f"{tokens_per_second:.1f}"


def _of_model(report: ModelReport) -> list[Table]:
    from rich.table import Table

    prediction = report.prediction
    name = f"The model: {report.architecture}, {report.parameters / 1e9:.2f} billion parameters"
    tables = [models_table([prediction], name)]
    if report.plan:
        tables.append(render_plan(report.plan))
    if report.gpu_plan:
        tables.append(render_gpu_plan(report.gpu_plan))
    lines = Table(box=None, show_header=False, pad_edge=False)
    if report.gpu_plan:
        lines.add_row("How fast the GPU is was not measured; the other figures are the processor's")
    if report.gpu_refusal:
        lines.add_row(f"On the GPU: {report.gpu_refusal}")
    if report.refusal:
        lines.add_row(f"Refused: {report.refusal}" if report.plan is None else report.refusal)
    if prediction.levels and prediction.runs != "whole":
        lines.add_row(f"Levels of precision: {level_names(prediction.levels)}")
    if trial := report.trial:
        lines.add_row(
            f"Tried at {trial.context} tokens of context: {trial.measured:.1f} tok/s, and"
            f" {trial.predicted:.1f} were predicted"
        )
    return [*tables, lines]
