"""CoreInfer Edge: decode GGUF models with their core neurons (arXiv 2410.18311)."""

from coreinfer_edge.errors import (
    ArgumentError,
    CoreInferError,
    DownloadError,
    InsufficientMemoryError,
    LibraryConflictError,
    ModelFileError,
    NativeError,
    PromptTooLongError,
    UnsupportedModelError,
)
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
    "ModelFileError",
    "NativeError",
    "PromptTooLongError",
    "UnsupportedModelError",
]
