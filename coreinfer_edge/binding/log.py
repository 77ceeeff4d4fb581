"""What ggml and llama.cpp log, caught for an error message instead of printed."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coreinfer_edge.binding import load as native

_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_install_lock = threading.Lock()

# The last lines are kept: what went wrong is among them, and each model logs thousands.
LINES_KEPT = 500


class _Capture(threading.local):
    """What collects what this thread logs, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[tuple[deque[str], bool]] = []


_capture = _Capture()

# The callback that was set before ours, and its data: it gets what no thread collects.
_before: tuple[Any, ctypes.c_void_p] | None = None


def _on_line(level: int, text: bytes, _data: int | None) -> None:
    stack = _capture.stack
    if stack:
        lines, echo = stack[-1]
        lines.append(text.decode("utf-8", "replace"))
        if echo and sys.stderr is not None:
            print(lines[-1], end="", file=sys.stderr)
    elif _before is not None:
        callback, data = _before
        callback(level, text, data)


# For the life of the process: a thread of llama.cpp may be about to call it at any time.
_callback = _LogCallback(_on_line)


@functools.cache
def _log_functions() -> tuple[Any, Any]:
    """Getter and setter of libllama's log callback; the setter sets ggml's too."""
    lib = native.load_library("llama")
    for function in (lib.llama_log_get, lib.llama_log_set):
        # Also declared by the binding, on another CDLL object, with types of its own.
        function.restype = None
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return lib.llama_log_get, lib.llama_log_set


def _install() -> None:
    """Set the callback, unless it is set already."""
    global _before
    get, set_ = _log_functions()
    ours = ctypes.cast(_callback, ctypes.c_void_p)
    with _install_lock:
        current, data = ctypes.c_void_p(), ctypes.c_void_p()
        get(ctypes.byref(current), ctypes.byref(data))
        if current.value != ours.value:
            _before = (_LogCallback(current.value), data) if current.value else None
            set_(ours, None)


@contextmanager
def captured_log(echo: bool = False) -> Iterator[deque[str]]:
    """Collect what ggml and llama.cpp log in this thread: the last LINES_KEPT pieces.

    Args:
        echo: also print it on standard error.

    Lines of other threads, llama.cpp's own among them, go where they would go without this: the
    callback that was set before, the binding's as a rule, which prints errors, and all with
    ``verbose``. One set later with ``llama_log_set`` gets them too, from the next call of this
    function on.
    """
    _install()
    lines: deque[str] = deque(maxlen=LINES_KEPT)
    _capture.stack.append((lines, echo))
    try:
        yield lines
    finally:
        _capture.stack.pop()
