"""The errors of this package. Each message says what is wrong, where, and what to do."""

from __future__ import annotations


class CoreInferError(Exception):
    """Base of every error raised by coreinfer_edge."""


class LibraryConflictError(CoreInferError):
    """Other llama.cpp libraries, or another module ``llama_cpp``, prevent the use of ours."""


class ModelFileError(CoreInferError):
    """The model file is missing, unreadable, cut off or not a valid GGUF."""


class UnsupportedModelError(CoreInferError):
    """The file is a valid GGUF, but the model in it cannot run (or not with a core set)."""


class ArgumentError(CoreInferError, ValueError):
    """An argument has a value that it cannot have."""


class PromptTooLongError(CoreInferError, ValueError):
    """The prompt does not fit into the context."""


class InsufficientMemoryError(CoreInferError, MemoryError):
    """The request needs more memory than is available."""


class MemoryBudgetError(InsufficientMemoryError):
    """The model does not fit into its memory budget; the message says what would fit."""


class DownloadError(CoreInferError):
    """A model could not be fetched from the hub."""


class NativeError(CoreInferError):
    """The native library reported a failure."""


class MissingPackageError(CoreInferError, ImportError):
    """An optional package that this task needs is not installed."""


class NotCopyableError(CoreInferError, TypeError):
    """A loaded model cannot be pickled or copied."""
