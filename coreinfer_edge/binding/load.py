"""Loads the bundled llama.cpp libraries and the llama_cpp binding that belongs to them.

The wheel carries the binding (the Python files of the pinned llama-cpp-python) and the libraries
built with our patches side by side, in ``_bundled/llama_cpp`` and ``_bundled/llama_cpp/lib``.
Importing this module makes ``import llama_cpp`` mean that pair for the whole process. An installed
llama-cpp-python stays as it is, and serves the processes that do not import coreinfer_edge.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coreinfer_edge.errors import LibraryConflictError

__all__ = ["BINDING_DIR", "LIB_DIR", "file_name", "llama_cpp", "load_library"]


def _bundled() -> Path:
    """The folder with the binding and its libraries: of these sources, or of the installed package.

    Python started in a clone imports the sources there, which hide the installed package and have
    no build of their own. ``core`` checks that library and sources fit together.
    """
    own = Path(__file__).resolve().parents[1] / "_bundled"
    installed = (Path(entry).resolve() / "coreinfer_edge" / "_bundled" for entry in sys.path)
    found = (folder for folder in (own, *installed) if (folder / "llama_cpp" / "lib").is_dir())
    return next(found, own)


BINDING_DIR = _bundled() / "llama_cpp"
LIB_DIR = BINDING_DIR / "lib"


def _foreign_libraries() -> list[str]:
    """Paths of libllama and libggml that this process has mapped from elsewhere (Linux only)."""
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {Path(fields[5]) for line in maps if len(fields := line.split(maxsplit=5)) == 6}
    return sorted(
        str(path)
        for path in paths
        if path.name.startswith(("libllama.", "libggml")) and path.parent != LIB_DIR
    )


def _load_binding() -> None:
    """Put our llama_cpp into ``sys.modules``, or raise LibraryConflictError."""
    loaded = sys.modules.get("llama_cpp")
    if loaded is not None:
        where = Path(loaded.__file__ or "").parent.resolve()
        if where == BINDING_DIR:
            return
        raise LibraryConflictError(
            f"llama_cpp was already imported from {where}, with libraries that have no core-neuron"
            " path: import coreinfer_edge before llama_cpp, or use them in separate processes"
        )
    if foreign := _foreign_libraries():
        raise LibraryConflictError(
            f"this process has already loaded other llama.cpp libraries ({', '.join(foreign)}):"
            " import coreinfer_edge first, or use them in separate processes"
        )
    spec = importlib.util.spec_from_file_location("llama_cpp", BINDING_DIR / "__init__.py")
    if spec is None or spec.loader is None or not LIB_DIR.is_dir():
        raise LibraryConflictError(
            f"{BINDING_DIR} has no llama.cpp build: install coreinfer-edge with pip"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules["llama_cpp"] = module
    try:
        with _threads_wait_briefly(), _own_libraries():
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["llama_cpp"]
        raise


@contextmanager
def _threads_wait_briefly() -> Iterator[None]:
    """Have the OpenMP that is loaded meanwhile spin for some microseconds, and then sleep.

    By default waiting threads spin for milliseconds, on the processor that the thread waited for
    may need. SmolLM2, 2 cores of an EPYC, tokens per second decoded with spin counts of 0, 1000 and
    300000 (the default): 54, 290, 290 on a quiet machine; with two other busy programs 83, 157, and
    none within 25 seconds. The user's own settings hold. The variable goes again: it is not meant
    for the OpenMP of other libraries, nor for child processes.
    """
    if any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = "1000"
    try:
        yield
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)


@contextmanager
def _own_libraries() -> Iterator[None]:
    # The binding would follow this variable to other libraries than the ones it belongs to.
    override = os.environ.pop("LLAMA_CPP_LIB_PATH", None)
    try:
        yield
    finally:
        if override is not None:
            os.environ["LLAMA_CPP_LIB_PATH"] = override


def file_name(path: Path) -> bytes:
    """A path as the libraries take it: UTF-8 on Windows, elsewhere the bytes of the file system."""
    return str(path).encode() if os.name == "nt" else os.fsencode(path)


def load_library(name: str) -> ctypes.CDLL:
    """Load one of the bundled shared libraries, e.g. ``"ggml-base"`` or ``"coreinfer"``."""
    from llama_cpp._ctypes_extensions import load_shared_library

    library: ctypes.CDLL = load_shared_library(name, LIB_DIR)
    return library


def _load_backends() -> None:
    """Load the backends of a build that keeps them in libraries of their own (GGML_BACKEND_DL).

    ggml would look for them beside the executable, which is Python.
    """
    ggml = load_library("ggml")
    ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    if ggml.ggml_backend_reg_count() == 0:
        ggml.ggml_backend_load_all_from_path(file_name(LIB_DIR))


_load_binding()
_load_backends()

# Ours by now, whatever else is installed: the other modules take it from here.
import llama_cpp  # noqa: E402
