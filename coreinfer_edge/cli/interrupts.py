"""Ctrl-C and SIGTERM: what Python drops of them is raised again."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TERMINATED = 143

# Long enough for the callback or the destructor to have ended; another drop starts it anew.
_RAISED_AGAIN_AFTER = 0.02


def raise_dropped_interrupts() -> None:
    """Raise an interrupt again that fell into a callback of a library, or into a destructor.

    Python cannot pass on an exception from there: it tells sys.unraisablehook and goes on.
    """
    others = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            _raise_soon(signal.SIGINT)
        elif dropped.exc_type is SystemExit and str(dropped.exc_value) == str(TERMINATED):
            _raise_soon(signal.SIGTERM)
        else:
            others(dropped)

    sys.unraisablehook = hook


def _raise_soon(number: int) -> None:
    # from another thread: raised here it would be dropped again, with this hook
    timer = threading.Timer(_RAISED_AGAIN_AFTER, _raise, (number,))
    timer.daemon = True
    timer.start()


def _raise(number: int) -> None:
    if sys.platform == "win32":
        signal.raise_signal(number)
    elif (main := threading.main_thread().ident) is not None:
        signal.pthread_kill(main, number)  # to that thread, so that it does not sleep on


@contextmanager
def ends_when_terminated() -> Iterator[None]:
    """Let SIGTERM end the command as an exception does, so that its temporary files go too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
