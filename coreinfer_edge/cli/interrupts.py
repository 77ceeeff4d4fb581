"""Ctrl-C and SIGTERM: raises again the exceptions that Python drops."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TERMINATED = 143

# Long enough for the callback or the destructor to end; if it drops the exception again, the hook
# raises it once more.
_RAISED_AGAIN_AFTER = 0.02


def raise_dropped_interrupts() -> None:
    """Raise an interrupt again that came during a callback of a library, or a destructor.

    Python cannot raise an exception from there. It calls sys.unraisablehook and goes on.
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
    # from another thread: here Python would drop it again
    timer = threading.Timer(_RAISED_AGAIN_AFTER, _raise, (number,))
    timer.daemon = True
    timer.start()


def _raise(number: int) -> None:
    if sys.platform == "win32":
        signal.raise_signal(number)
    elif (main := threading.main_thread().ident) is not None:
        signal.pthread_kill(main, number)  # to the main thread, to wake it if it sleeps


@contextmanager
def ends_when_terminated() -> Iterator[None]:
    """Make SIGTERM raise an exception, so that the command removes its temporary files."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
