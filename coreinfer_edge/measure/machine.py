"""Describes the machine of a benchmark, and measures how fast it reads memory."""

from __future__ import annotations

import platform
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from coreinfer_edge.run.process_memory import available_bytes
from coreinfer_edge.run.processors import allowed_processors

# More than any cache, if enough memory is available.
READ_BYTES = 2 * 2**30
REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """The machine of a benchmark.

    Attributes:
        processor: name of the processor.
        cores: logical processors that this process may use.
        memory_bytes: size of the memory.
        cache_bytes: size of the last-level cache, 0 if the system does not say.
        system: operating system.
        read_bytes_per_second: rate at which ``threads`` threads together read memory.
        threads: number of threads.
    """

    processor: str
    cores: int
    memory_bytes: int
    cache_bytes: int
    system: str
    read_bytes_per_second: float
    threads: int


def this_machine(threads: int) -> Machine:
    """Describe the machine, and measure its memory."""
    return Machine(
        processor=_processor(),
        cores=allowed_processors(),
        memory_bytes=psutil.virtual_memory().total,
        cache_bytes=_cache_bytes(),
        system=f"{platform.system()} {platform.release()}",
        read_bytes_per_second=read_bandwidth(threads),
        threads=threads,
    )


def read_bandwidth(threads: int, n_bytes: int = READ_BYTES) -> float:
    """The best rate at which ``threads`` threads together read memory, in bytes per second.

    The kernel is numpy's maximum of 64-bit integers. It is vector code with one load for each
    vector, and far faster than memory while the data is in a cache.

    Args:
        threads: number of threads; each reads its own part.
        n_bytes: bytes to read; at most a quarter of the available memory is used.
    """
    n_bytes = min(n_bytes, available_bytes()[0] // 4)
    data = np.ones(max(threads, n_bytes // 8), dtype=np.int64)
    parts = np.array_split(data, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(REPEATS):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def _cache_bytes() -> int:
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)K", file.read_text().strip()):
            sizes.append(int(match[1]) * 1024)
    return max(sizes)
