"""Standard input, output and error if they are closed or full."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

# The replacements of closed streams. A closed standard output is replaced for reading only, so
# that writing to it fails.
_OPEN = {0: os.O_RDONLY, 1: os.O_RDONLY, 2: os.O_WRONLY}


def open_closed_streams() -> None:
    """Replace closed standard streams; otherwise the next opened file would take their number.

    Writing to a closed standard output then fails, as on a full disk.
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
    """Discard the rest of the output: Python would try to write it again at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
    with suppress(OSError):
        sys.stdout.flush()
