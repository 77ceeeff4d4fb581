"""What is wrong with a device, or could be better, and what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from coreinfer_edge.doctor.device import Device
from coreinfer_edge.doctor.models import Prediction, Rates

MIB = 1 << 20

# Slower than any memory that was made for a computer of the last ten years; a Raspberry Pi 3 reads
# about 2 GB/s.
SLOW_MEMORY = 1.5e9
# A prompt of a model that streams reads its FFNs twice: 3 GB take a minute and more.
SLOW_DISK = 90e6
HOT = 80.0
LEAST_MEMORY = 256 * MIB

# Bits of a Raspberry Pi's get_throttled that hold now; the same 16 higher held since it started.
_THROTTLED = {
    0: "the voltage is too low: use the supply that the board's maker sells, and a short cable",
    1: "the processor's frequency is capped: cool the board",
    2: "the processor is slowed down: cool the board, or use a stronger power supply",
    3: "the board is near its limit of temperature: cool it",
}
# x86's own governors: with these drivers "powersave" goes to full speed under load.
_HARDWARE_DRIVERS = ("intel_pstate", "amd-pstate-epp", "amd_pstate_epp")
# ggml's name of an instruction set, and the processor's
_OF_GGML = {
    "AVX": "avx",
    "AVX2": "avx2",
    "FMA": "fma",
    "AVX512": "avx512f",
    "AVX512_VNNI": "avx512_vnni",
    "DOTPROD": "asimddp",
    "MATMUL_INT8": "i8mm",
}
_ENOUGH_FOR_OURS = ({"avx2", "fma"}, {"asimd"})


@dataclass(frozen=True)
class Finding:
    """One thing.

    Attributes:
        kind: ``"problem"``, or ``"advice"`` if all works.
        what: what is the matter.
        do: what to do.
    """

    kind: Literal["problem", "advice"]
    what: str
    do: str


def findings(
    device: Device,
    rates: Rates | None,
    models: Sequence[Prediction],
    threads: int,
    budget: int | None = None,
) -> list[Finding]:
    """Everything, problems first.

    Args:
        device: that was looked at.
        rates: measured with ``threads``; None if nothing was.
        models: how they would run.
        threads: to give.
        budget: bytes that were planned for; None for what is available.
    """
    found = [
        *_kernels(device),
        *_processors(device, threads, rates is not None),
        *_frequency(device),
        *_memory(device, rates, models, budget),
        *_disk(rates, models),
        *_gpus(device),
    ]
    return sorted(found, key=lambda finding: finding.kind != "problem")


def _kernels(device: Device) -> Iterator[Finding]:
    has = set(device.instructions)
    unused = [i for name, i in _OF_GGML.items() if i in has and name not in device.ggml]
    if unused:
        yield Finding(
            "problem",
            f"this build of llama.cpp leaves out what the processor has: {', '.join(unused)}",
            "install a wheel for several processors, or compile on this device (docs/install.md)",
        )
    wanted = os.environ.get("COREINFER_KERNELS", "")
    if wanted and device.our_kernels and device.kernels != device.our_kernels[0]:
        yield Finding(
            "problem",
            f"COREINFER_KERNELS is {wanted}, and the fastest kernels here are"
            f" {device.our_kernels[0]}",
            "unset COREINFER_KERNELS",
        )
    elif not device.our_kernels and any(has >= enough for enough in _ENOUGH_FOR_OURS):
        yield Finding(
            "problem",
            "this build has none of our kernels, and the processor could run them",
            "compile with a newer compiler, or install a wheel",
        )
    elif not device.our_kernels:
        yield Finding(
            "advice",
            "there are no kernels of ours for this processor: llama.cpp's are used, and neurons"
            " are kept or left out, without levels between",
            "nothing: it works, slower than on a processor that has them",
        )


def _processors(device: Device, threads: int, measured: bool) -> Iterator[Finding]:
    if device.allowed_cores < device.cores:
        yield Finding(
            "advice",
            f"this process may run on {device.allowed_cores} of {device.cores} processors",
            "widen its mask (taskset, CPUAffinity of systemd, --cpuset-cpus of docker)",
        )
    if device.cpu_quota is not None and device.cpu_quota < device.allowed_cores:
        yield Finding(
            "advice",
            f"a control group allows the time of {device.cpu_quota:g} processors, and there are"
            f" {device.allowed_cores}: more threads than that wait for each other",
            f"raise the quota (CPUQuota of systemd, --cpus of docker), or give --threads {threads}",
        )
    if device.threads[0] < threads:
        yield Finding(
            "advice",
            f"by default {device.threads[0]} of {threads} threads decode",
            f"give --threads {threads}{': the figures here were measured so' if measured else ''}",
        )
    elif measured and threads < device.threads[1]:
        yield Finding(
            "advice",
            f"the figures here have {threads} threads, and {device.threads[1]} are allowed",
            f"give --threads {device.threads[1]}",
        )
    if device.load is not None and device.load > 0.5 * device.cores:
        yield Finding(
            "advice",
            f"in the last minute other programs wanted {device.load:.1f} processors of"
            f" {device.cores}: {'the figures here are' if measured else 'answers are'} slower than"
            " without them",
            "run doctor again when they have ended"
            if measured
            else "run models when they have ended",
        )


def _frequency(device: Device) -> Iterator[Finding]:
    bits = device.throttled or 0
    for bit, what in _THROTTLED.items():
        cause, _, remedy = what.partition(": ")
        if bits >> bit & 1:
            yield Finding("problem", cause, remedy)
        elif bits >> (bit + 16) & 1:
            yield Finding("advice", f"since the start it happened: {cause}", remedy)
    if device.governor == "powersave" and device.driver not in _HARDWARE_DRIVERS:
        yield Finding(
            "problem",
            "the governor 'powersave' holds the processor at its lowest frequency",
            "echo ondemand | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
        )
    limit, most = device.frequency_hz, device.most_frequency_hz
    if limit and most and limit < 0.9 * most:
        yield Finding(
            "problem",
            f"the processor is limited to {limit / 1e9:.1f} of {most / 1e9:.1f} GHz",
            "look for a power profile (powerprofilesctl, nvpmodel), or raise scaling_max_freq",
        )
    if device.celsius is not None and device.celsius >= HOT and not bits & 0xF:
        yield Finding(
            "advice", f"the processor has {device.celsius:.0f} °C and may slow down", "cool it"
        )


def _memory(
    device: Device, rates: Rates | None, models: Sequence[Prediction], budget: int | None
) -> Iterator[Finding]:
    none_runs = len(models) > 1 and all(model.runs == "refused" for model in models)
    if budget is not None and budget > device.available_bytes:
        yield Finding(
            "advice",
            f"--memory has {budget // MIB} MiB, and {device.available_bytes // MIB} MiB are"
            " available here: what is planned is for another device",
            "leave --memory out to plan for this one",
        )
    elif budget is not None and none_runs:
        yield Finding(
            "problem",
            f"no model of the table runs in the {_amount(budget)} of --memory",
            f"give more: {device.available_bytes // MIB} MiB are available",
        )
    elif none_runs:
        yield Finding(
            "problem",
            f"{device.available_bytes // MIB} MiB of memory are available"
            f" ({_of_limit(device)}), and no model of the table runs in that",
            "end other programs, raise the limit, or use a device with more memory",
        )
    elif device.available_bytes < LEAST_MEMORY:
        yield Finding(
            "problem",
            f"only {device.available_bytes // MIB} MiB of memory are available"
            f" ({_of_limit(device)})",
            "end other programs (a desktop takes half a GiB), or raise the limit",
        )
    elif (
        device.memory_limit != "machine" and device.available_bytes < (device.memory_bytes or 0) / 2
    ):
        yield Finding(
            "advice",
            f"{_of_limit(device)} leaves {device.available_bytes // MIB} of"
            f" {(device.memory_bytes or 0) // MIB} MiB",
            "raise it (MemoryMax of systemd, --memory of docker, ulimit -v) for larger models",
        )
    if device.swap_used_bytes > max(64 * MIB, device.swap_bytes // 4):
        yield Finding(
            "problem",
            f"{device.swap_used_bytes // MIB} MiB are swapped out: memory is short already, and a"
            " model whose weights are swapped out is slower than one that streams",
            "end other programs, or give --memory auto, which never takes more than there is",
        )
    if rates is not None and rates.memory < SLOW_MEMORY:
        yield Finding(
            "problem",
            f"memory is read at {rates.memory / 1e9:.1f} GB/s, less than that of any board that we"
            " know",
            "look for a power profile or heat that slows it, and for other programs",
        )


def _amount(n_bytes: int) -> str:
    return f"{n_bytes // MIB} MiB" if n_bytes >= MIB else f"{n_bytes} B"


def _of_limit(device: Device) -> str:
    if device.memory_limit == "machine":
        return "the memory of this machine"
    return (
        f"the limit of a {device.memory_limit}"
        if device.memory_limit[0] != "a"
        else ("the limit on the address space")
    )


def _disk(rates: Rates | None, models: Sequence[Prediction]) -> Iterator[Finding]:
    if rates is None or not rates.disk or rates.disk >= SLOW_DISK:
        return
    streamed = [m for m in models if m.runs == "streams" and m.prompt_read_seconds]
    first = streamed[0] if streamed else None
    waits = (
        f": a {first.size or 'model that streams'} waits {first.prompt_read_seconds:.0f} s for it"
        " with each prompt"
        if first
        else ""
    )
    yield Finding(
        "problem" if streamed else "advice",
        f"the disk is read at {rates.disk / 1e6:.0f} MB/s, as a card is{waits}",
        "keep models on an SSD (USB 3 or NVMe), or choose one that is in memory whole",
    )


def _gpus(device: Device) -> Iterator[Finding]:
    usable = [gpu for gpu in device.gpus if not gpu.is_remote]
    if "NVIDIA" in device.seen_gpus and not usable:
        yield Finding(
            "problem",
            "there is an NVIDIA GPU, and this build cannot use it",
            'CMAKE_ARGS="-DGGML_CUDA=ON" pip install . (docs/gpu.md); if it was built so, look at'
            " the driver (nvidia-smi)",
        )
    elif device.seen_gpus and not usable:
        yield Finding(
            "advice",
            f"there is a GPU of {' and '.join(device.seen_gpus)}, and this build does not use it",
            'CMAKE_ARGS="-DGGML_VULKAN=ON" pip install . (docs/install.md); one that shares the'
            " processor's memory decodes no faster",
        )
    for gpu in device.gpus:
        if gpu.memory_bytes and gpu.free_bytes < gpu.memory_bytes // 4:
            yield Finding(
                "advice",
                f"{gpu.free_bytes // MIB} of {gpu.memory_bytes // MIB} MiB are free on {gpu.name}",
                "end what uses it (nvidia-smi lists that), or give --gpu-memory a size",
            )
