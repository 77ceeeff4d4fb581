"""Runs programs in a memory control group of their own (Linux, version 1 or 2; needs root)."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ROOT = Path("/sys/fs/cgroup")


class NoControlGroups(Exception):
    """This system gives this process no memory control groups; says why."""


class ControlGroup:
    """A group that processes are started in.

    Args:
        path: its folder.
        version: of the control groups, 1 or 2.
    """

    def __init__(self, path: Path, version: int) -> None:
        self.path = path
        self._version = version

    def limit(self, n_bytes: int) -> None:
        """Let the group have so much memory, page cache included, and no swap."""
        if self._version == 1:
            self._write("memory.limit_in_bytes", n_bytes)
            self._write("memory.memsw.limit_in_bytes", n_bytes, needed=False)
        else:
            self._write("memory.max", n_bytes)
            self._write("memory.swap.max", 0, needed=False)

    def peak(self) -> int | None:
        """The most memory that the group has had, page cache included; None if not told."""
        name = "memory.max_usage_in_bytes" if self._version == 1 else "memory.peak"
        try:
            return int((self.path / name).read_text())
        except OSError:
            return None

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """``subprocess.run`` in the group."""

        def enter() -> None:
            (self.path / "cgroup.procs").write_text(str(os.getpid()))

        return subprocess.run(command, preexec_fn=enter, text=True, **options)

    def _write(self, name: str, value: int, *, needed: bool = True) -> None:
        try:
            (self.path / name).write_text(str(value))
        except OSError as error:
            if needed:
                raise NoControlGroups(f"{self.path / name} cannot be set: {error}") from error


@contextmanager
def control_group() -> Iterator[ControlGroup]:
    """A new memory control group, removed at the end.

    Raises:
        NoControlGroups: there are none, or this process may not make one.
    """
    if (_ROOT / "memory" / "memory.limit_in_bytes").exists() or (_ROOT / "memory").is_dir():
        base, version = _ROOT / "memory", 1
    elif (_ROOT / "cgroup.controllers").exists():
        base, version = _ROOT, 2
        if "memory" not in (_ROOT / "cgroup.subtree_control").read_text().split():
            raise NoControlGroups("the memory controller is not enabled in /sys/fs/cgroup")
    else:
        raise NoControlGroups("no control groups at /sys/fs/cgroup: this needs Linux")
    path = base / f"coreinfer-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir()
    except OSError as error:
        raise NoControlGroups(
            f"{path} cannot be made ({error.strerror}): this needs root"
        ) from error
    try:
        yield ControlGroup(path, version)
    finally:
        path.rmdir()
