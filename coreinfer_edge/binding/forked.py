"""Marks models as unusable in a forked child: their threads and locks stayed with the parent."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Protocol

from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.errors import NativeError

FORKED = (
    "this process was forked after the model was loaded, and a child cannot use it: load the model"
    " in the child only, or start the child with multiprocessing's spawn method"
)
_NO_THREADS = (
    "this process was forked after a model was loaded, and GNU OpenMP cannot compute in the child"
    " with several threads: start it with multiprocessing's spawn method, or give n_threads=1"
    " and n_threads_batch=1"
)


class _Native(Protocol):
    def abandon(self, reason: str) -> None:
        """Let go of everything native without freeing it; each use raises ``reason`` from now on.

        Freeing may wait for threads that the child does not have.
        """


_threads_left = False  # with the parent: a pool of GNU OpenMP, which would be waited for for ever

_loaded = False  # whether there ever was a model, closed by now or not
_watched: weakref.WeakSet[_Native] = weakref.WeakSet()


def watch(thing: _Native) -> None:
    """Have ``thing`` abandoned in children that are forked from now on."""
    global _loaded
    _loaded = True
    _watched.add(thing)


def check_threads(*counts: int | None) -> None:
    """Refuse to compute with these numbers of threads (None: several) where that would hang.

    Raises:
        NativeError: this process is a child forked from one that had used a model.
    """
    if _threads_left and any(count != 1 for count in counts):
        raise NativeError(_NO_THREADS)


def _uses_gnu_openmp() -> bool:
    if b"OPENMP = 1" not in llama_cpp.llama_print_system_info():
        return False
    try:
        return b"libgomp" in Path("/proc/self/maps").read_bytes()
    except OSError:
        return False


def _in_child() -> None:
    global _threads_left
    _threads_left = _threads_left or (_loaded and _uses_gnu_openmp())
    for thing in list(_watched):
        thing.abandon(FORKED)
    _watched.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
