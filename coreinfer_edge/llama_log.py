"""What ggml and llama.cpp log, caught for an error message instead of printed."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coreinfer_edge import native

_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_log_lock = threading.RLock()


@functools.cache
def _log_functions() -> tuple[tuple[Any, Any], ...]:
    """Getter and setter of the log callbacks: libllama's, which sets ggml's too, then ggml's."""
    pairs = []
    for library, prefix in (("llama", "llama"), ("ggml-base", "ggml")):
        lib = native.load_library(library)
        get, set_ = getattr(lib, f"{prefix}_log_get"), getattr(lib, f"{prefix}_log_set")
        # Both are also declared by the binding, on another CDLL object, with types of its own.
        for function in (get, set_):
            function.restype = None
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        pairs.append((get, set_))
    return tuple(pairs)


@contextmanager
def captured_log(echo: bool = False) -> Iterator[list[str]]:
    """Collect what ggml and llama.cpp log in a list, in place of their callbacks of the moment.

    Args:
        echo: also print it on standard error.

    The callbacks are the whole process's: lines of other threads land in the list too.
    """
    lines: list[str] = []

    def keep(_level: int, text: bytes, _data: int | None) -> None:
        lines.append(text.decode("utf-8", "replace"))
        if echo:
            print(lines[-1], end="", file=sys.stderr)

    callback = _LogCallback(keep)
    functions = _log_functions()
    with _log_lock:
        previous = []
        for get, _ in functions:
            pointers = ctypes.c_void_p(), ctypes.c_void_p()
            get(*(ctypes.byref(pointer) for pointer in pointers))
            previous.append(pointers)
        functions[0][1](ctypes.cast(callback, ctypes.c_void_p), None)
        try:
            yield lines
        finally:
            for (_, set_), pointers in zip(functions, previous, strict=True):
                set_(*pointers)
