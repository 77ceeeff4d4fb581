"""The whole examination: the device, what it can run, and what is wrong."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from coreinfer_edge.binding.core import devices
from coreinfer_edge.doctor.device import Device, this_device
from coreinfer_edge.doctor.findings import Finding, findings
from coreinfer_edge.doctor.gpus import on_gpus
from coreinfer_edge.doctor.models import (
    SPEED_CONTEXT,
    Prediction,
    Rates,
    absent_header,
    cached_bytes,
    main_type,
    of_plan,
    planned,
    predictions,
    tokens_per_second,
)
from coreinfer_edge.doctor.rates import Disk, best_token_seconds, measure, measure_disk
from coreinfer_edge.errors import CoreInferError, MemoryBudgetError
from coreinfer_edge.measure.description import bytes_read_by_type
from coreinfer_edge.model.header import GGUFHeader
from coreinfer_edge.model.loadable import check_loadable
from coreinfer_edge.run.gpu_plan import GpuPlan
from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.run.load_plan import plan_gpu_memory
from coreinfer_edge.run.memory_plan import MemoryPlan
from coreinfer_edge.run.planning import parse_size
from coreinfer_edge.run.process_memory import control_groups
from coreinfer_edge.run.processors import allowed_processors

# A model is tried out if all of it is expected to take less.
TRIAL_SECONDS = 4.0
# Packing weights while they are loaded; a slow board.
_LOAD_BYTES_PER_SECOND = 400e6
_SHORT_CONTEXT = 16
_TRIAL_TOKENS = 120


@dataclass(frozen=True)
class Trial:
    """A short measurement of a model.

    Attributes:
        context: tokens in the context.
        predicted: tokens per second, from the rates.
        measured: tokens per second, of whole decoding by the default of ``EdgeLLM``.
    """

    context: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class ModelReport:
    """What becomes of one model file.

    Attributes:
        architecture, parameters: of the model.
        prediction: what the plan promises.
        plan: for main memory; None if it is refused.
        gpu_plan: for all GPUs; None without one, or where nothing fits.
        gpu_refusal: why nothing fits on them, and what would; else "".
        refusal: why it is refused, and what would fit, or why it does not run; else "".
        trial: None if nothing was measured, or it would have taken long.
    """

    architecture: str
    parameters: int
    prediction: Prediction
    plan: MemoryPlan | None
    gpu_plan: GpuPlan | None
    gpu_refusal: str
    refusal: str
    trial: Trial | None


@dataclass(frozen=True)
class DoctorReport:
    """What ``doctor`` says.

    Attributes:
        version: of this package.
        device: what this is.
        threads: with which everything was measured.
        memory: that was planned for.
        rates: what was measured; None with ``quick``, or where measuring failed.
        disk: how fast weights can be streamed; None with ``quick``, or where that cannot be told.
        models: models of common sizes; empty if one was named.
        model: the one that was named.
        findings: what is wrong.
        seconds: that all of it took.
    """

    version: str
    device: Device
    threads: int
    memory: str
    rates: Rates | None
    disk: Disk | None
    models: list[Prediction]
    model: ModelReport | None
    findings: list[Finding]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The report in types that JSON has. No path, no name of a user or a host is in it."""
        result = dataclasses.asdict(self)
        if self.model:
            plans = {"plan": self.model.plan, "gpu_plan": self.model.gpu_plan}
            for name, plan in plans.items():
                if plan is not None:
                    made = result["model"][name] = plan.as_dict()
                    # a control group's path has names in it
                    for part in (made, *made.get("devices", ()), made.get("host") or {}):
                        part.pop("source", None)
        return result


def examine(
    header: GGUFHeader | None = None,
    threads: int | None = None,
    memory: str = "auto",
    quick: bool = False,
    step: Callable[[str], None] = lambda what: None,
) -> DoctorReport:
    """Examine this device, for one model or for models in general.

    Args:
        header: of the model.
        threads: to measure with; by default as many as processors are allowed.
        memory: to plan for, as ``EdgeLLM`` takes it.
        quick: measure nothing.
        step: told what comes next.

    Raises:
        ArgumentError: ``memory`` is no size.
        CoreInferError: the model cannot be loaded anywhere.
    """
    start = time.perf_counter()
    budget = None if memory == "auto" else parse_size(memory)
    if header is not None:
        check_loadable(header)
    threads = threads or allowed_processors()
    step("looking at the device")
    device = this_device()
    # planned before anything is measured: the plan counts what the process has
    plan, refusal = (None, "") if header is None else _plan(header, memory)
    rates: Rates | None = None
    disk: Disk | None = None
    if not quick:
        step("reading the disk")
        disk = measure_disk(header.path if header else None)
        step("measuring memory and kernels")
        try:
            rates = measure(threads, device.cache_bytes)
            rates = dataclasses.replace(rates, disk=disk.bytes_per_second if disk else None)
        except (CoreInferError, MemoryError, OSError, RuntimeError) as error:
            step(f"nothing was measured ({str(error) or 'there is not enough memory'})")
    step("planning")
    if header is None:
        models, model = list(predictions(rates, memory)), None
        host = device.available_bytes if budget is None else budget
        models = [
            dataclasses.replace(
                found, on_gpus=on_gpus(absent_header(found.size, found.type), device.gpus, host)
            )
            for found in models
        ]
    else:
        model = _model(header, plan, refusal, device, rates, threads, step)
        models = []
    seen = [model.prediction] if model else models
    return DoctorReport(
        version=_version(),
        device=device,
        threads=threads,
        memory=memory,
        rates=rates,
        disk=disk,
        models=models,
        model=model,
        findings=findings(device, rates, seen, threads, budget),
        seconds=time.perf_counter() - start,
    )


def _version() -> str:
    try:
        return metadata.version("coreinfer-edge")
    except metadata.PackageNotFoundError:
        return ""


def _plan(header: GGUFHeader, memory: str) -> tuple[MemoryPlan | None, str]:
    try:
        return planned(header, memory), ""
    except MemoryBudgetError as error:
        return None, without_names(str(error), header)


def without_names(message: str, header: GGUFHeader) -> str:
    """A message about a model without paths, and without the addresses of RPC servers."""
    names = {gpu.description: gpu.name for gpu in devices() if gpu.is_remote and gpu.description}
    names |= {f"the control group {group}": "a control group" for group in control_groups("memory")}
    for file in (header.path, *header.files):
        names[str(file)] = names[file.name] = "the model"
        if len(file.parents) > 1:  # neither "." nor the root
            names[str(file.parent)] = "its folder"
    for name in sorted(names, key=len, reverse=True):  # a folder is part of its files' paths
        message = message.replace(name, names[name])
    return message


def _model(
    header: GGUFHeader,
    plan: MemoryPlan | None,
    refusal: str,
    device: Device,
    rates: Rates | None,
    threads: int,
    step: Callable[[str], None],
) -> ModelReport:
    gpu_plan, gpu_refusal = None, ""
    if device.gpus:
        try:
            gpu_plan = plan_gpu_memory(header, "auto")
        except CoreInferError as error:
            gpu_refusal = without_names(str(error), header)
    prediction = (
        Prediction("", main_type(header), header.file_size, "refused")
        if plan is None
        else of_plan(header, plan, rates)
    )
    trial = None
    if rates is not None and plan is not None and plan.whole:
        step("trying the model")
        try:
            trial = _trial(header, rates, threads)
        except (CoreInferError, RuntimeError) as error:  # the binding's, of llama_decode
            refusal = without_names(f"it does not run: {error}", header)
    return ModelReport(
        architecture=header.architecture,
        parameters=sum(tensor.n_elements for tensor in header.tensors.values()),
        prediction=prediction,
        plan=plan,
        gpu_plan=gpu_plan,
        gpu_refusal=gpu_refusal,
        refusal=refusal,
        trial=trial,
    )


def _trial(header: GGUFHeader, rates: Rates, threads: int) -> Trial | None:
    """Decode a few tokens, if that is cheap."""
    read = bytes_read_by_type(header)

    def predicted(context: int) -> float:
        speed = tokens_per_second(header, read, cached_bytes(header, context), rates)
        assert speed is not None
        return speed

    left = TRIAL_SECONDS - header.file_size / min(rates.disk or 1e9, _LOAD_BYTES_PER_SECOND)
    for context in (SPEED_CONTEXT, _SHORT_CONTEXT):
        if (context + 24) / predicted(context) < left:
            break
    else:
        return None
    n_ctx = context + _TRIAL_TOKENS + 1
    with EdgeLLM(header, n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads) as llm:
        measured = 1 / best_token_seconds(llm, context, _TRIAL_TOKENS)
    return Trial(context, predicted(context), measured)
