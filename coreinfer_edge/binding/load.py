"""Loads the bundled llama.cpp libraries and the llama_cpp binding that belongs to them.

The wheel carries the binding (the Python files of the pinned llama-cpp-python, patched) and the
libraries built with our patches, in ``_bundled/llama_cpp`` and ``_bundled/llama_cpp/lib``. Both
have names of their own, ``coreinfer_edge._bundled.llama_cpp`` and ``libcoreinfer-llama``, so that
an installed llama-cpp-python works in the same process, whichever is imported first.
``install_as_llama_cpp`` makes ``import llama_cpp`` mean ours.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from coreinfer_edge.binding.cuda import used_by_others
from coreinfer_edge.errors import LibraryConflictError

__all__ = [
    "BINDING_DIR",
    "LIB_DIR",
    "file_name",
    "install_as_llama_cpp",
    "llama_cpp",
    "load_library",
]

NAME = "coreinfer_edge._bundled.llama_cpp"

# A function of each library that others bring.
_SYMBOLS = ("llama_model_default_params", "ggml_init")


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


def _check_no_symbols_in_the_way() -> None:
    """Refuse a process in which our libraries would call the functions of other ones.

    The dynamic linker of ELF systems prefers what the program itself is linked with, what is
    preloaded, and what was loaded with RTLD_GLOBAL.
    """
    if sys.platform in ("win32", "darwin"):  # there a library names the one that it calls
        return
    symbol = next((s for s in _SYMBOLS if hasattr(ctypes.CDLL(None), s)), None)
    if symbol is not None:
        raise LibraryConflictError(
            f"this process has a llama.cpp whose functions are visible everywhere ({symbol}), and"
            " ours would call them: do not load it with RTLD_GLOBAL or LD_PRELOAD, or import"
            " coreinfer_edge before it"
        )


def _load_binding() -> ModuleType:
    """The bundled binding, under the name it has in the package."""
    if not LIB_DIR.is_dir():
        raise LibraryConflictError(
            f"{BINDING_DIR} has no llama.cpp build: install coreinfer-edge with pip"
        )
    _check_no_symbols_in_the_way()
    # a package without a file of its own, wherever the folder is
    bundled = ModuleType(NAME.rpartition(".")[0])
    bundled.__path__ = [str(BINDING_DIR.parent)]
    sys.modules[bundled.__name__] = bundled
    with _threads_wait_briefly(), _own_libraries():
        return importlib.import_module(NAME)


def install_as_llama_cpp() -> None:
    """Make ``import llama_cpp`` mean the bundled binding for the rest of this process.

    For code that is written for llama-cpp-python and is to run on the same libraries.

    Raises:
        LibraryConflictError: another ``llama_cpp`` was imported already.
    """
    loaded = sys.modules.get("llama_cpp")
    if loaded not in (None, llama_cpp):
        where = Path(getattr(loaded, "__file__", None) or "").parent
        raise LibraryConflictError(
            f"llama_cpp was already imported from {where}: call install_as_llama_cpp() before that"
        )
    for name, module in list(sys.modules.items()):
        if name == NAME or name.startswith(f"{NAME}."):
            sys.modules[f"llama_cpp{name.removeprefix(NAME)}"] = module


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
    prefix = "" if name == "coreinfer" else "coreinfer-"
    load = llama_cpp._ctypes_extensions.load_shared_library
    library: ctypes.CDLL = load(prefix + name, LIB_DIR)
    return library


def _load_backends() -> None:
    """Load the backends of a build that keeps them in libraries of their own (GGML_BACKEND_DL).

    ggml would look for them beside the executable, which is Python.
    """
    ggml = load_library("ggml")
    ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    if ggml.ggml_backend_reg_count() == 0:
        logger = logging.getLogger("llama-cpp-python")  # the binding's: it would say what it loads
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            ggml.ggml_backend_load_all_from_path(file_name(LIB_DIR))
        finally:
            logger.setLevel(level)


# The limits of their CUDA contexts are not ours to set.
GPUS_OF_OTHERS = used_by_others()

if TYPE_CHECKING:
    import llama_cpp
else:
    llama_cpp = _load_binding()
with _threads_wait_briefly():
    _load_backends()
