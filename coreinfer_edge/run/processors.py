"""How many processors this process may use, which a container or a mask can make fewer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

from coreinfer_edge.run import process_memory


def allowed_processors() -> int:
    """Processors of the machine, less what the affinity of this process or a quota takes away."""
    counts = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    counts += [max(1, math.ceil(quota)) for quota in quotas()]
    return min(counts)


def default_threads() -> tuple[int, int]:
    """Threads for decoding and for pre-fill: llama-cpp-python's, but no more than are allowed."""
    allowed = allowed_processors()
    return min(max(1, (os.cpu_count() or 1) // 2), allowed), allowed


def quotas() -> Iterator[float]:
    """What each control group around the process allows, in processors."""
    for group in process_memory.control_groups("cpu"):
        try:
            if (group / "cpu.max").exists():
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota = (group / "cpu.cfs_quota_us").read_text().strip()
                period = (group / "cpu.cfs_period_us").read_text().strip()
            if quota != "max" and int(quota) > 0 and int(period) > 0:
                yield int(quota) / int(period)
        except (OSError, ValueError):
            continue
