"""The errors this package raises. Each message says what was wrong, where, and what to do."""

from __future__ import annotations


class CoreInferError(Exception):
    """Base of every error raised by coreinfer_edge."""


class LibraryConflictError(CoreInferError):
    """Other llama.cpp libraries are in the way of ours, or another ``llama_cpp`` of the binding."""


class ModelFileError(CoreInferError):
    """The model file is missing, unreadable, cut off or not a valid GGUF."""


class UnsupportedModelError(CoreInferError):
    """The file is a valid GGUF, but the model in it cannot run (or not with a core set)."""


class ArgumentError(CoreInferError, ValueError):
    """An argument is outside what it may be."""


class PromptTooLongError(CoreInferError, ValueError):
    """The prompt does not fit into the context."""


class InsufficientMemoryError(CoreInferError, MemoryError):
    """There is not enough memory for what was asked."""


class MemoryBudgetError(InsufficientMemoryError):
    """The model does not fit into the memory that it was given; says what would."""


class DownloadError(CoreInferError):
    """A model could not be fetched from the hub."""


class NativeError(CoreInferError):
    """The native library reported a failure."""


class MissingPackageError(CoreInferError, ImportError):
    """A package is not installed that only this task needs."""


class NotCopyableError(CoreInferError, TypeError):
    """A loaded model cannot be pickled or copied."""
