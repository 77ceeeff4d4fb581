"""The pages of mapped model files, which weights in a layout of their own no longer need."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

_MADV_DONTNEED = 4

# Of the progress of loading, between two times that pages are given back.
_STEP = 0.05


def give_back_pages(files: Sequence[Path]) -> None:
    """Take the pages of these files out of the memory of this process, where they are mapped.

    They stay in the page cache as long as the system likes, and come back when they are read. On
    Linux only.
    """
    if sys.platform != "linux":
        return
    names = {os.path.realpath(path) for path in files}
    libc = ctypes.CDLL(None)
    with (
        suppress(OSError),
        open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as f,
    ):
        for line in f:
            addresses, permissions, _, _, _, *name = line.rstrip("\n").split(maxsplit=5)
            # what is written to a private mapping would be lost
            if name and name[0] in names and permissions.endswith("s"):
                start, end = (int(address, 16) for address in addresses.split("-"))
                # pages that are locked stay
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def giving_back(files: Sequence[Path]) -> Callable[[float], bool]:
    """A ``progress_callback`` of ``Llama`` that gives pages back while tensors are loaded."""
    last = 0.0

    def on_progress(progress: float) -> bool:
        nonlocal last
        if progress >= last + _STEP or progress >= 1:
            last = progress
            give_back_pages(files)
        return True

    return on_progress
