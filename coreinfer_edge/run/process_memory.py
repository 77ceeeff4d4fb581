"""What memory this process has, and what it may have, as the system counts it."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil

if sys.platform != "win32":
    import resource

# Where the version 1 and 2 hierarchies of control groups are mounted.
_CGROUPS = Path("/sys/fs/cgroup")

# The groups of this process.
_OWN_GROUPS = Path("/proc/self/cgroup")


def private_bytes() -> int | None:
    """Memory that only this process has, None where the system does not tell (Linux does).

    Without clean pages of files: the system can drop them, and those of libraries count as private
    or not as other processes come and go.
    """
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    private = [line for line in lines if line.startswith("Private_")]
    fields = [line.split() for line in private if not line.startswith("Private_Clean")]
    return sum(int(kibibytes) for _, kibibytes, _ in fields) * 1024


def release_free_memory() -> None:
    """Give the system what was freed and the C library still keeps, where it can (glibc)."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(ctypes.c_size_t(0))


def peak_memory(process: int | None = None) -> int:
    """Highest resident memory so far of this process, or of another one by its number, in bytes.

    On macOS another one's memory at this moment: the system does not tell its highest.
    """
    with suppress(OSError, StopIteration):
        # where the system has it: getrusage counts the process that started this one too
        lines = Path(f"/proc/{process or 'self'}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    if sys.platform == "win32" or process is not None:
        try:
            memory = psutil.Process(process).memory_info()
        except psutil.Error:
            return 0
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def major_faults() -> int:
    """Page faults of this process so far that had to read from a disk; 0 on Windows."""
    return 0 if sys.platform == "win32" else resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def available_bytes() -> tuple[int, str]:
    """What this process can still take, and what sets that limit.

    The least of what the machine has available and what each control group around the process
    (version 1 or 2) leaves of its limit. The page cache counts as available: it gives way.
    """
    found = [(_machine_available(), "the memory of this machine")]
    if (left := address_space_left()) is not None:
        found.append((left, "the limit on this process's address space, ulimit -v"))
    found += [
        _left(group) for group in control_groups("memory") if (group / _limit_file(group)).exists()
    ]
    return min(found)


def address_space_left() -> int | None:
    """What a limit on the address space of this process leaves; None without one."""
    if sys.platform == "win32":
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        used = psutil.Process().memory_info().vms
    except (psutil.Error, OSError):
        used = 0
    return max(0, limit - used)


def _machine_available() -> int:
    try:
        return int(psutil.virtual_memory().available)
    except (psutil.Error, OSError, KeyError):  # no /proc
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize  # nobody says: nothing is refused for it


def _limit_file(group: Path) -> str:
    return "memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes"


def _left(group: Path) -> tuple[int, str]:
    """What a group leaves of its limit."""
    limit_file = _limit_file(group)
    usage_file = "memory.current" if limit_file == "memory.max" else "memory.usage_in_bytes"
    try:
        limit = (group / limit_file).read_text().strip()
        if limit == "max":
            return sys.maxsize, ""
        used = int((group / usage_file).read_text()) - _cached(group)
        return max(0, int(limit) - max(0, used)), f"the control group {group}"
    except (OSError, ValueError):
        return sys.maxsize, ""


def _cached(group: Path) -> int:
    """Bytes of the group's memory that are copies of files."""
    fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    keys = ("total_inactive_file", "total_active_file")
    if keys[0] not in fields:
        keys = ("inactive_file", "active_file")
    return sum(int(fields.get(key, 0)) for key in keys)


def control_groups(controller: str) -> list[Path]:
    """The control groups around this process that have a controller, from its own outwards."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            base = _CGROUPS
        elif controller in controllers.split(","):
            # some systems mount those of the processor together: cpu,cpuacct
            mounts = (_CGROUPS / controller, _CGROUPS / controllers)
            base = next((mount for mount in mounts if mount.is_dir()), mounts[0])
        else:
            continue
        # in a container the name is the host's, and the mount shows the container's own group
        group = base / name.lstrip("/")
        groups += [path for path in (group, *group.parents) if path.is_relative_to(base)]
    return [group for group in groups if os.path.isdir(group)]
