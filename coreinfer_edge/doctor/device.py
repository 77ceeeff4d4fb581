"""Describes a device: its processor and kernels, what a process may have of it, and its GPUs.

Everything is read from files of the system, which may be missing: Android shows little of /proc and
/sys, a container its own view. What is not known is None or empty.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from coreinfer_edge.binding.core import devices, is_cuda, is_remote, kernels
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.run.process_memory import available_bytes
from coreinfer_edge.run.processors import default_threads, quotas

# Instructions that ggml's or our kernels have a version for, as /proc/cpuinfo has them.
_X86 = (
    "ssse3",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
)
_ARM = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme")

# Parts of Arm (implementer 0x41) in devices that people have; the kernel names none of them.
_ARM_PARTS = {
    0xD03: "Cortex-A53",
    0xD04: "Cortex-A35",
    0xD05: "Cortex-A55",
    0xD07: "Cortex-A57",
    0xD08: "Cortex-A72",
    0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1",
    0xD0D: "Cortex-A77",
    0xD40: "Neoverse-V1",
    0xD41: "Cortex-A78",
    0xD42: "Cortex-A78AE",
    0xD44: "Cortex-X1",
    0xD46: "Cortex-A510",
    0xD47: "Cortex-A710",
    0xD48: "Cortex-X2",
    0xD49: "Neoverse-N2",
    0xD4D: "Cortex-A715",
    0xD4E: "Cortex-X3",
    0xD4F: "Neoverse-V2",
    0xD80: "Cortex-A520",
    0xD81: "Cortex-A720",
    0xD82: "Cortex-X4",
}
_PCI_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}


@dataclass(frozen=True)
class Gpu:
    """A device of ggml beside the processor.

    Attributes:
        name: as llama.cpp logs it; ``"RPC0"`` is one of another machine.
        description: the product; of another machine nothing, for that is its address.
        free_bytes: of its memory.
        memory_bytes: of its memory.
    """

    name: str
    description: str
    free_bytes: int
    memory_bytes: int

    @property
    def is_remote(self) -> bool:
        """Whether it is of another machine, behind a network."""
        return is_remote(self.name)

    @property
    def is_cuda(self) -> bool:
        """Whether it is used through CUDA, which takes memory itself."""
        return is_cuda(self.name)


@dataclass(frozen=True)
class Device:
    """A device, and what this process may have of it. Nothing in it names a person or a place.

    Attributes:
        board: what the maker calls it, where the firmware tells (Raspberry Pi, Jetson).
        processor: name of the processor; of several kinds of cores, all.
        machine: its architecture, as ``platform.machine()``.
        system: the operating system.
        python: version of Python.
        instructions: sets of instructions that matter here.
        our_kernels: those of our kernels that this build has and the processor can run.
        kernels: those in use, or ``"none"``.
        ggml: what ggml's CPU backend uses, in its words.
        cores: logical processors of the machine.
        allowed_cores: those that this process may run on.
        cpu_quota: processors' worth of time that control groups allow; None without a limit.
        threads: threads for decoding and for prompts, if the user gives none.
        memory_bytes: of the machine.
        available_bytes: what this process can still take.
        memory_limit: what sets that: ``"machine"``, ``"control group"`` or ``"address space"``.
        swap_bytes, swap_used_bytes: swap, compressed memory included.
        cache_bytes: the last-level cache; 0 if unknown.
        governor, driver: of the processor's frequency.
        frequency_hz, most_frequency_hz: the limit in force, and what the processor could do.
        celsius: the hottest sensor of the processor.
        throttled: the firmware's bits on a Raspberry Pi (get_throttled).
        load: programs that want a processor, mean of the last minute.
        gpus: devices that this build can use.
        seen_gpus: makers of GPUs that the system has.
    """

    board: str
    processor: str
    machine: str
    system: str
    python: str
    instructions: list[str]
    our_kernels: list[str]
    kernels: str
    ggml: list[str]
    cores: int
    allowed_cores: int
    cpu_quota: float | None
    threads: tuple[int, int]
    memory_bytes: int | None
    available_bytes: int
    memory_limit: str
    swap_bytes: int
    swap_used_bytes: int
    cache_bytes: int
    governor: str
    driver: str
    frequency_hz: int | None
    most_frequency_hz: int | None
    celsius: float | None
    throttled: int | None
    load: float | None
    gpus: list[Gpu]
    seen_gpus: list[str]


def this_device(root: Path = Path("/")) -> Device:
    """Describe the device; ``root`` is where /proc and /sys are."""
    cpuinfo = _text(root / "proc/cpuinfo")
    frequency = root / "sys/devices/system/cpu/cpu0/cpufreq"
    available, limit = available_bytes()
    here, chosen = kernels()
    memory, swap, swap_used = _memory(root)
    return Device(
        board=_text(root / "proc/device-tree/model").strip("\0 \n"),
        processor=_processor(cpuinfo),
        machine=platform.machine(),
        system=f"{platform.system()} {platform.release().split('-')[0]}"
        + (", Android" if os.path.exists(root / "system/build.prop") else ""),
        python=platform.python_version(),
        instructions=_instructions(cpuinfo),
        our_kernels=here,
        kernels=chosen,
        ggml=ggml_features(llama_cpp.llama_print_system_info().decode()),
        cores=os.cpu_count() or 1,
        allowed_cores=_allowed_cores(),
        cpu_quota=min(quotas(), default=None),
        threads=default_threads(),
        memory_bytes=memory,
        available_bytes=available,
        memory_limit="control group"
        if "control group" in limit
        else "address space"
        if "address space" in limit
        else "machine",
        swap_bytes=swap,
        swap_used_bytes=swap_used,
        cache_bytes=_cache_bytes(root),
        governor=_text(frequency / "scaling_governor").strip(),
        driver=_text(frequency / "scaling_driver").strip(),
        frequency_hz=_kilohertz(frequency / "scaling_max_freq"),
        most_frequency_hz=_kilohertz(frequency / "cpuinfo_max_freq"),
        celsius=_celsius(root),
        throttled=_throttled(root),
        load=_load(root),
        gpus=_gpus(),
        seen_gpus=sorted(set(_seen_gpus(root))),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _kilohertz(path: Path) -> int | None:
    value = _number(path)
    return None if value is None else value * 1000


def _fields(cpuinfo: str, name: str) -> list[str]:
    found = re.findall(rf"^{name}\s*:\s*(.+?)\s*$", cpuinfo, re.MULTILINE | re.IGNORECASE)
    return list(dict.fromkeys(found))


def _processor(cpuinfo: str) -> str:
    if names := _fields(cpuinfo, "model name"):
        return ", ".join(names)
    parts = _fields(cpuinfo, "CPU part") if "0x41" in _fields(cpuinfo, "CPU implementer") else []
    names = [_ARM_PARTS.get(int(part, 16), f"Arm part {part}") for part in parts]
    if names:
        return ", ".join(names)
    hardware = _fields(cpuinfo, "Hardware")
    return hardware[0] if hardware else platform.processor() or platform.machine()


def _instructions(cpuinfo: str) -> list[str]:
    # cores of different kinds list different ones: a thread may run on any
    lists = [set(line.split()) for line in _fields(cpuinfo, "flags") + _fields(cpuinfo, "Features")]
    common = set.intersection(*lists) if lists else set()
    # of this architecture alone: an emulator can show the file of its host
    names = _X86 if platform.machine().lower() in ("x86_64", "amd64") else _ARM
    return [name for name in names if name in common]


def ggml_features(system_info: str) -> list[str]:
    """What the CPU backend has, of llama.cpp's line about the system."""
    match = re.search(r"CPU : (.*?)(?:\| *(?=[A-Z]\w+ : )|$)", system_info.replace("\n", " "))
    entries = match[1].split("|") if match else []
    pairs = [entry.split("=") for entry in entries if "=" in entry]
    return [name.strip() for name, value in pairs if value.strip() != "0"]


def _allowed_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory(root: Path) -> tuple[int | None, int, int]:
    """The machine's memory, its swap, and how much of that is used."""
    lines = re.findall(r"^(\w+):\s+(\d+) kB$", _text(root / "proc/meminfo"), re.MULTILINE)
    sizes = {name: int(kibibytes) * 1024 for name, kibibytes in lines}
    if "MemTotal" in sizes:
        swap = sizes.get("SwapTotal", 0)
        return sizes["MemTotal"], swap, swap - sizes.get("SwapFree", swap)
    with suppress(psutil.Error, OSError, KeyError, ValueError):
        swap_memory = psutil.swap_memory()
        return int(psutil.virtual_memory().total), int(swap_memory.total), int(swap_memory.used)
    return None, 0, 0


def _cache_bytes(root: Path) -> int:
    sizes = [0]
    for file in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)([KM])", _text(file).strip()):
            sizes.append(int(match[1]) << (10 if match[2] == "K" else 20))
    return max(sizes)


def _celsius(root: Path) -> float | None:
    zones = (root / "sys/class/thermal").glob("thermal_zone*")
    found = [
        value / 1000
        for zone in zones
        if re.search("cpu|soc|x86_pkg|core", _text(zone / "type"), re.IGNORECASE)
        and (value := _number(zone / "temp")) is not None
    ]
    return max(found, default=None)


def _throttled(root: Path) -> int | None:
    text = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled").strip()
    return int(text, 16) if re.fullmatch(r"(0x)?[0-9a-fA-F]+", text) else None


def _load(root: Path) -> float | None:
    match = re.match(r"\d+\.\d+", _text(root / "proc/loadavg"))
    return float(match[0]) if match else None


def _gpus() -> list[Gpu]:
    return [
        # of an RPC server the description is its address
        Gpu(d.name, "" if d.is_remote else d.description, d.free, d.total)
        for d in devices()
    ]


def _seen_gpus(root: Path) -> Iterator[str]:
    """Makers of the GPUs of the system. Those without memory of their own are there too."""
    if any((root / "proc/driver/nvidia/gpus").glob("*")) or os.path.exists(root / "dev/nvhost-gpu"):
        yield "NVIDIA"
    for vendor in (root / "sys/class/drm").glob("card*/device/vendor"):
        if name := _PCI_VENDORS.get(_text(vendor).strip()):
            yield name
