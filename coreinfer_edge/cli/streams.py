"""Standard input, output and error as this process was given them: closed, full, not UTF-8."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

# Where the others are opened: reading from, or writing to, what was closed fails.
_OPEN = {0: os.O_RDONLY, 1: os.O_RDONLY, 2: os.O_WRONLY}


def open_closed_streams() -> None:
    """Stand in for standard streams that were closed; a file opened next would take their place.

    What is written to standard output then fails, as it would on a full disk.
    """
    for number, mode in _OPEN.items():
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest number that is free
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            # not the number itself: a library may have opened a file there by now
            null = os.open(os.devnull, _OPEN[number])
            setattr(sys, name, os.fdopen(null, "w" if number else "r"))


def drop_output() -> None:
    """Let the rest of the output go nowhere: Python would try it again when it ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
    with suppress(OSError):
        sys.stdout.flush()
