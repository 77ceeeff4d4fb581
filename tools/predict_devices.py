"""Prints the table of docs/devices.md: what devices can run, from their data sheets alone.

The plans are those of ``coreinfer-edge doctor`` (``memory=``), for models that are not there. The
speed is the bytes that a token reads over the memory's bandwidth. Nothing is measured.

python tools/predict_devices.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

# Part of the bandwidth of a data sheet that programs get at worst: a Raspberry Pi 4 reaches 5.5 of
# 12.8 GB/s (STREAM).
LEAST_PART = 0.4
MODELS = (
    ("0.1B", "q4_0"),
    ("0.5B", "q4_k_m"),
    ("1B", "q4_k_m"),
    ("3B", "q4_k_m"),
    ("8B", "q4_k_m"),
)


@dataclass(frozen=True)
class Device:
    """A device of the table.

    Attributes:
        name: of the device, and of its processor.
        memory: what it has.
        budget: what a model can have of it, the rest being the system's.
        bandwidth: of its memory, in GB/s.
        source: the number of the source in docs/devices.md.
        kernels: whether our kernels run on it (AVX2, and 64-bit ARM); elsewhere neurons are only
            kept or left out.
    """

    name: str
    memory: str
    budget: str
    bandwidth: float
    source: int
    kernels: bool = False


DEVICES = (
    Device("Raspberry Pi Zero 2 W (4 Cortex-A53)", "512 MB", "350MiB", 3.6, 1, True),
    Device("Raspberry Pi 3B+ (4 Cortex-A53)", "1 GB", "800MiB", 3.6, 1, True),
    Device("Raspberry Pi 4 (4 Cortex-A72)", "2 GB", "1700MiB", 12.8, 2, True),
    Device("Raspberry Pi 4 (4 Cortex-A72)", "8 GB", "7500MiB", 12.8, 2, True),
    Device("Raspberry Pi 5 (4 Cortex-A76)", "4 GB", "3600MiB", 17.1, 3, True),
    Device("Raspberry Pi 5 (4 Cortex-A76)", "8 GB", "7500MiB", 17.1, 3, True),
    Device("Jetson Nano (4 Cortex-A57)", "4 GB", "3200MiB", 25.6, 4, True),
    Device("Jetson Orin Nano (6 Cortex-A78AE)", "8 GB", "6500MiB", 68, 5, True),
    Device("phone, Snapdragon 4 Gen 1", "4 GB", "1500MiB", 17, 6, True),
    Device("phone, Snapdragon 4 Gen 2", "8 GB", "4GiB", 25.6, 6, True),
    Device("phone, Snapdragon 8 Gen 2", "12 GB", "7GiB", 67.2, 7, True),
    Device("laptop of 2012, Core i5-3320M (no AVX2)", "4 GB", "2800MiB", 25.6, 8),
    Device("laptop of 2015, Core i5-6200U", "8 GB", "6500MiB", 34.1, 9, True),
    Device("mini PC, N100, DDR4-3200", "8 GB", "7GiB", 25.6, 10, True),
    Device("mini PC, N100, DDR5-4800", "16 GB", "14GiB", 38.4, 10, True),
    Device("GPU, GTX 1650", "4 GB", "3500MiB", 128, 11),
    Device("GPU, RTX 3050", "8 GB", "7300MiB", 224, 11),
)


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in ("with", "without"):
        for device in DEVICES:
            if device.kernels == (sys.argv[1] == "with"):
                print(row(device))
        return 0
    if len(sys.argv) > 1:
        print(__doc__)
        return 0 if sys.argv[1] in ("-h", "--help") else 2
    columns = ["device", "memory", "for a model", "GB/s"]
    columns += [f"{size} {type.upper()}" for size, type in MODELS]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    rows: dict[str, str] = {}
    for which in ("with", "without"):  # a process chooses its kernels once
        kernels = {} if which == "with" else {"COREINFER_KERNELS": "none"}
        command = [sys.executable, __file__, which]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **kernels}
        )
        if done.returncode:
            sys.stderr.write(done.stderr)
            return done.returncode
        chosen = [device for device in DEVICES if device.kernels == (which == "with")]
        rows |= {
            f"{d.name}{d.memory}": text
            for d, text in zip(chosen, done.stdout.splitlines(), strict=True)
        }
    for device in DEVICES:
        print(rows[f"{device.name}{device.memory}"])
    return 0


def row(device: Device) -> str:
    from coreinfer_edge.doctor.models import Rates, absent_header, predict

    rates = Rates(device.bandwidth * 1e9, {}, 0.0)
    cells = [device.name, device.memory, device.budget, f"{device.bandwidth:g} [{device.source}]"]
    for size, type in MODELS:
        found = predict(absent_header(size, type), rates, device.budget, size, type)
        if found.tokens_per_second is None:
            cells.append("no")
            continue
        most = found.tokens_per_second
        text = f"{rounded(LEAST_PART * most)} to {rounded(most)}"
        if found.runs != "whole":
            text += f" at {found.density:.2f}" + (", poor" if found.is_poor else "")
        elif found.context < 4096:
            text += f", context {found.context}"
        cells.append(text)
    return f"| {' | '.join(cells)} |"


def rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
