"""CoreInfer Edge: decode GGUF models with their core neurons (arXiv 2410.18311)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from coreinfer_edge.errors import (
    ArgumentError,
    CoreInferError,
    DownloadError,
    InsufficientMemoryError,
    LibraryConflictError,
    MemoryBudgetError,
    MissingPackageError,
    ModelFileError,
    NativeError,
    NotCopyableError,
    PromptTooLongError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from coreinfer_edge.binding.load import install_as_llama_cpp
    from coreinfer_edge.run.figures import Figures
    from coreinfer_edge.run.llm import EdgeLLM

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CoreInferError",
    "DownloadError",
    "EdgeLLM",
    "Figures",
    "InsufficientMemoryError",
    "LibraryConflictError",
    "MemoryBudgetError",
    "MissingPackageError",
    "ModelFileError",
    "NativeError",
    "NotCopyableError",
    "PromptTooLongError",
    "UnsupportedModelError",
    "install_as_llama_cpp",
]

# Loaded on first use: they load llama.cpp, and --help should not wait for that.
_LAZY = {
    "EdgeLLM": "coreinfer_edge.run.llm",
    "Figures": "coreinfer_edge.run.figures",
    "install_as_llama_cpp": "coreinfer_edge.binding.load",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
