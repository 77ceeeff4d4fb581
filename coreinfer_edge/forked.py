"""Marks models as unusable in a forked child: their threads and locks stayed with the parent."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

FORKED = (
    "this process was forked after the model was loaded, and a child cannot use it: load the model"
    " in the child, or start the child with multiprocessing's spawn method"
)


class _Native(Protocol):
    def abandon(self, reason: str) -> None:
        """Let go of everything native without freeing it; each use raises ``reason`` from now on.

        Freeing may wait for threads that the child does not have.
        """


_watched: weakref.WeakSet[_Native] = weakref.WeakSet()


def watch(thing: _Native) -> None:
    """Have ``thing`` abandoned in children that are forked from now on."""
    _watched.add(thing)


def _in_child() -> None:
    for thing in list(_watched):
        thing.abandon(FORKED)
    _watched.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
