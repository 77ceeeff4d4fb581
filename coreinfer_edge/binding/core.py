"""The native core path of one llama.cpp context: statistics, gathering, activation.

A thin typed front for ``native/coreinfer.h``. The caller decides when each step is taken.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from coreinfer_edge.binding import forked
from coreinfer_edge.binding import load as native
from coreinfer_edge.choose.statistics import (
    LEVELS,
    CoreSet,
    Extra,
    Ffn,
    Floats,
    Level,
    Statistics,
)
from coreinfer_edge.errors import (
    ArgumentError,
    CoreInferError,
    InsufficientMemoryError,
    ModelFileError,
    NativeError,
    NotCopyableError,
    UnsupportedModelError,
)

API_VERSION = 15


_rpc_servers: set[str] = set()

# enum coreinfer_status
_ERRORS: dict[int, type[CoreInferError]] = {
    1: ArgumentError,
    2: ModelFileError,
    3: InsufficientMemoryError,
    4: UnsupportedModelError,
}

_FLOATS = ctypes.POINTER(ctypes.c_float)

# enum coreinfer_stat
_NORMALIZED, _TOP, _ACTIVE = 1, 2, 4

# enum coreinfer_graph
_DRAFT, _VERIFY, _VERIFY_THERE = 2, 3, 4


class _Ffn(ctypes.Structure):
    _fields_ = [
        ("layer", ctypes.c_int32),
        ("n_in", ctypes.c_int32),
        ("n_ff", ctypes.c_int32),
        ("n_out", ctypes.c_int32),
        ("up_type", ctypes.c_int32),
        ("down_type", ctypes.c_int32),
        ("gated", ctypes.c_bool),
        ("n_bytes", ctypes.c_uint64),
        ("neuron_bytes", ctypes.c_float * len(LEVELS)),
        ("neuron_errors", ctypes.c_float * len(LEVELS)),
        ("block", ctypes.c_int32),
    ]


class _Core(ctypes.Structure):
    _fields_ = [
        ("ffn", ctypes.c_int32),
        ("n_neurons", ctypes.c_int32),
        ("neurons", ctypes.POINTER(ctypes.c_int32)),
        ("fill", _FLOATS),
        ("levels", ctypes.POINTER(ctypes.c_uint8)),
    ]


class _Stats(ctypes.Structure):
    _fields_ = [
        ("sum", _FLOATS),
        ("sum_sq", _FLOATS),
        ("normalized_sq", _FLOATS),
        ("top", _FLOATS),
        ("active", _FLOATS),
        ("n_tokens", ctypes.c_float),
    ]


class _Stream(ctypes.Structure):
    _fields_ = [
        ("n_bytes", ctypes.c_uint64),
        ("read_seconds", ctypes.c_double),
        ("waited_seconds", ctypes.c_double),
    ]


class _Memory(ctypes.Structure):
    _fields_ = [
        ("weights", ctypes.c_uint64),
        ("packed", ctypes.c_uint64),
        ("cache", ctypes.c_uint64),
        ("compute", ctypes.c_uint64),
    ]


class _Device(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("free", ctypes.c_uint64),
        ("total", ctypes.c_uint64),
    ]


class Constants(ctypes.Structure):
    """Numbers of the library to plan with, as ``coreinfer.h`` describes them."""

    block: int
    device_block: int
    lookup_rows: int
    stream_min_chunks: int
    stream_chunk: int
    weights_ahead: int
    kernels: bytes
    _fields_ = [
        ("block", ctypes.c_int32),
        ("device_block", ctypes.c_int32),
        ("lookup_rows", ctypes.c_int32),
        ("stream_min_chunks", ctypes.c_int32),
        ("stream_chunk", ctypes.c_uint64),
        ("weights_ahead", ctypes.c_uint64),
        ("kernels", ctypes.c_char_p),
    ]


class Streamed(NamedTuple):
    """Weights that dense evaluation has read from the file.

    Attributes:
        n_bytes: bytes read.
        read_seconds: time that reading them took.
        waited_seconds: time that computing waited for them.
    """

    n_bytes: int
    read_seconds: float
    waited_seconds: float


def is_cuda(name: str) -> bool:
    """Whether a device of this name is a GPU of NVIDIA's, used through CUDA."""
    return name.startswith("CUDA")


def is_remote(name: str) -> bool:
    """Whether a device of this name is of an RPC server, behind a network."""
    return name.startswith("RPC")


class Device(NamedTuple):
    """A device of ggml beside the processor: a GPU, or one of an RPC server.

    Attributes:
        name: as llama.cpp logs it, ``"CUDA0"``.
        description: for a person.
        free: bytes of its memory that nobody uses.
        total: bytes of its memory.
    """

    name: str
    description: str
    free: int
    total: int

    @property
    def is_cuda(self) -> bool:
        """As ``is_cuda`` says."""
        return is_cuda(self.name)

    @property
    def is_remote(self) -> bool:
        """As ``is_remote`` says."""
        return is_remote(self.name)


class ContextMemory(NamedTuple):
    """Memory of a llama.cpp context and its model on one device, in bytes.

    Attributes:
        weights: the weights that are held in memory.
        packed: of these, the weights in the layout of our own kernels.
        cache: keys and values.
        compute: buffers of the largest graph.
    """

    weights: int
    packed: int
    cache: int
    compute: int


@functools.cache
def _library() -> ctypes.CDLL:
    lib = native.load_library("coreinfer")
    # before anything else is looked up: another version has other functions
    if (version := lib.coreinfer_api_version()) != API_VERSION:
        raise NativeError(
            f"libcoreinfer has interface {version}, the package needs {API_VERSION}:"
            " install coreinfer-edge again"
        )
    handle = ctypes.c_void_p
    signatures: dict[str, tuple[Any, Sequence[Any]]] = {
        "constants_get": (None, [ctypes.POINTER(Constants)]),
        "last_error": (ctypes.c_char_p, []),
        "kernels_here": (ctypes.c_char_p, []),
        "kernels_chosen": (ctypes.c_char_p, []),
        "load_packed": (ctypes.c_bool, [ctypes.c_bool, ctypes.c_bool]),
        "new": (
            ctypes.c_int,
            [
                handle,
                ctypes.POINTER(ctypes.c_char_p),
                ctypes.c_int32,
                ctypes.c_int32,
                ctypes.c_bool,
                ctypes.POINTER(handle),
            ],
        ),
        "free": (None, [handle]),
        "n_ffn": (ctypes.c_int32, [handle]),
        "ffn_get": (ctypes.c_int, [handle, ctypes.c_int32, ctypes.POINTER(_Ffn)]),
        "column_type": (ctypes.c_int32, [ctypes.c_int32]),
        "stats_collect": (
            ctypes.c_int,
            [handle, ctypes.c_bool, ctypes.c_uint32, ctypes.c_float],
        ),
        "stats_clear": (ctypes.c_int, [handle]),
        "stats_get": (ctypes.c_int, [handle, ctypes.c_int32, ctypes.POINTER(_Stats)]),
        "down_norms": (ctypes.c_int, [handle, _FLOATS]),
        "core_set": (ctypes.c_int, [handle, ctypes.POINTER(_Core), ctypes.c_int32]),
        "level_round": (ctypes.c_int, [ctypes.c_int, _FLOATS, ctypes.c_int64, _FLOATS]),
        "level_bytes": (
            ctypes.c_float,
            [ctypes.c_int, ctypes.c_int32, ctypes.c_bool, ctypes.c_int64],
        ),
        "device_level_bytes": (
            ctypes.c_float,
            [ctypes.c_int, ctypes.c_int32, ctypes.c_bool, ctypes.c_int64],
        ),
        "device_level_round": (
            ctypes.c_int,
            [ctypes.c_int, ctypes.c_int32, ctypes.c_bool, _FLOATS, ctypes.c_int64, _FLOATS],
        ),
        "core_use": (ctypes.c_int, [handle, ctypes.c_bool]),
        "graph_use": (ctypes.c_int, [handle, ctypes.c_int32]),
        "core_bytes": (ctypes.c_uint64, [handle]),
        "unread_buffer_type": (handle, []),
        "stream_ahead": (ctypes.c_int, [handle, ctypes.c_uint64]),
        "stream_begin": (ctypes.c_int, [handle, ctypes.c_int32]),
        "stream_end": (ctypes.c_int, [handle, ctypes.POINTER(_Stream)]),
        "n_devices": (ctypes.c_int32, []),
        "device_get": (ctypes.c_int, [ctypes.c_int32, ctypes.POINTER(_Device)]),
        "rpc_add": (ctypes.c_int, [ctypes.c_char_p]),
        "rpc_lost": (ctypes.c_bool, []),
        "host_buffer_type": (handle, []),
        "memory_get": (ctypes.c_int, [handle, ctypes.c_int32, ctypes.POINTER(_Memory)]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, f"coreinfer_{name}")
        function.restype, function.argtypes = result, arguments
    return lib


def _check(status: int) -> None:
    if status != 0:
        message = _library().coreinfer_last_error().decode("utf-8", "replace")
        raise _ERRORS.get(status, NativeError)(message)


@functools.cache
def constants() -> Constants:
    """The library's own numbers."""
    result = Constants()
    _library().coreinfer_constants_get(ctypes.byref(result))
    return result


def column_type(ggml_type: int) -> int:
    """The number of the type that the core columns of an ``ffn_down`` of this type are stored in.

    Columns cut across quantisation blocks, so they are requantised.

    Raises:
        ArgumentError: ggml has no type of this number.
    """
    result = int(_library().coreinfer_column_type(ggml_type))
    if result < 0:
        raise ArgumentError(f"{ggml_type} is no ggml_type")
    return result


def level_bytes(
    level: Level, ggml_type: int, n: int, columns: bool = False, on_device: bool = False
) -> float:
    """Bytes that n weights of a row of this type take at a level, beside other levels.

    0 if they cannot have it here. ``columns`` is for ``ffn_down``, whose columns are gathered.
    """
    lib = _library()
    of = lib.coreinfer_device_level_bytes if on_device else lib.coreinfer_level_bytes
    return float(of(LEVELS.index(level), ggml_type, columns, n))


def rounded(level: Level, weights: Floats) -> Floats:
    """The weights of one row [n] as a core set holds them at a level below full.

    Raises:
        ArgumentError: the level is full, or n is no multiple of 32.
    """
    row = np.ascontiguousarray(weights, dtype=np.float32)
    result = np.empty_like(row)
    _check(
        _library().coreinfer_level_round(
            LEVELS.index(level), _floats(row), len(row), _floats(result)
        )
    )
    return result


def rounded_on_device(
    level: Level, weights: Floats, ggml_type: int, columns: bool = False
) -> Floats:
    """The weights of one row [n] of this type as a core set on a device holds them at a level.

    Raises:
        ArgumentError: the level is full, or a device cannot have it for this n.
    """
    row = np.ascontiguousarray(weights, dtype=np.float32)
    result = np.empty_like(row)
    of = _library().coreinfer_device_level_round
    _check(of(LEVELS.index(level), ggml_type, columns, _floats(row), len(row), _floats(result)))
    return result


def unread_buffer_type() -> int | None:
    """Address of the buffer type of weights that stay in the file; None on systems without it."""
    address: int | None = _library().coreinfer_unread_buffer_type()
    return address


def host_buffer_type() -> int:
    """Address of the buffer type of weights in main memory, from where devices copy fast."""
    return int(_library().coreinfer_host_buffer_type())


def devices() -> list[Device]:
    """The devices beside the processor, as their memory is now."""
    result = []
    for i in range(_library().coreinfer_n_devices()):
        device = _Device()
        _check(_library().coreinfer_device_get(i, ctypes.byref(device)))
        name, description = device.name.decode(), device.description.decode("utf-8", "replace")
        result.append(Device(name, description, device.free, device.total))
    return result


def has_device() -> bool:
    """Whether there is a device beside the processor. A build for one may have none."""
    return int(_library().coreinfer_n_devices()) > 0


def add_rpc_server(address: str) -> None:
    """Let models that are loaded from now on use the devices of an RPC server.

    Args:
        address: ``"host:port"`` of llama.cpp's ``rpc-server``.

    Raises:
        ArgumentError: no such server answers.
    """
    try:
        _check(_library().coreinfer_rpc_add(address.encode()))
    except ModelFileError as error:
        raise ArgumentError(f"rpc {address!r}: {error}") from error
    _rpc_servers.add(address)


def check_rpc(cause: BaseException | None = None) -> None:
    """Raise an error if an RPC server has gone.

    Raises:
        NativeError: what was computed since is wrong.
    """
    if _rpc_servers and _library().coreinfer_rpc_lost():
        raise NativeError(
            f"a server of rpc={', '.join(sorted(_rpc_servers))} does not answer any more: start it"
            " again, and this process after it"
        ) from cause


def context_memory(llama_context: int, device: int = -1) -> ContextMemory:
    """Memory of a context; if its model was loaded without data, the memory it would take.

    Args:
        llama_context: the ``llama_context *``.
        device: index in ``devices()``, -1 for main memory.
    """
    memory = _Memory()
    _check(_library().coreinfer_memory_get(llama_context, device, ctypes.byref(memory)))
    return ContextMemory(memory.weights, memory.packed, memory.cache, memory.compute)


@contextmanager
def loading(packed: bool, tied: bool = False) -> Iterator[bool]:
    """Around loading a model in this thread.

    Args:
        packed: quantised weights that the CPU multiplies get the layout of our own kernels, where
            this processor has a kernel for their type. These are faster than llama.cpp's, and
            round differently.
        tied: the embedding is the output too, and is to be in memory once.

    Yields:
        Whether it is so: False also if this processor has none of the kernels.

    Raises:
        ArgumentError: the environment variable COREINFER_KERNELS names no kernels.
    """
    kernels = os.environ.get("COREINFER_KERNELS", "")
    known = constants().kernels.decode().split()
    if kernels not in ("", *known):
        raise ArgumentError(
            f"COREINFER_KERNELS is {kernels!r}: it must be one of {', '.join(known)}"
        )
    is_on = bool(_library().coreinfer_load_packed(packed, tied))
    try:
        yield is_on
    finally:
        _library().coreinfer_load_packed(False, False)


def kernels() -> tuple[list[str], str]:
    """Our kernels that this processor can run, the fastest first, and those in use or "none"."""
    lib = _library()
    return lib.coreinfer_kernels_here().decode().split(), lib.coreinfer_kernels_chosen().decode()


def has_kernels() -> bool:
    """Whether this processor has kernels of our own, which ``loading`` lays weights out for."""
    with loading(True) as is_on:
        return is_on


def _floats(array: Floats | None) -> Any:
    return None if array is None else array.ctypes.data_as(_FLOATS)


class CoreContext:
    """Collects statistics in, and puts core sets into, one llama.cpp context.

    Args:
        llama_context: the ``llama_context *`` of the binding.
        files: the GGUF files that its model was loaded from.
        n_threads: threads for gathering.
        packed: whether core sets and streamed weights have the layout of our own kernels.
        lock: held during each call, so that none meets another thread's evaluation or ``close``.

    Raises:
        UnsupportedModelError: the model has no dense FFN.
        ModelFileError: the files cannot be read.
        ArgumentError: of every method after ``close``, and in a child process that was forked
            later.
    """

    def __init__(
        self,
        llama_context: int,
        files: Sequence[Path],
        n_threads: int,
        packed: bool = False,
        lock: threading.RLock | None = None,
    ) -> None:
        self._lib = _library()
        self._lock = lock or threading.RLock()
        self._handle = ctypes.c_void_p()
        self._gone = "this core context is closed: make a new one, or a new EdgeLLM"
        self._extra = Extra()
        paths = (ctypes.c_char_p * len(files))(*map(native.file_name, files))
        _check(
            self._lib.coreinfer_new(
                llama_context, paths, len(files), n_threads, packed, ctypes.byref(self._handle)
            )
        )
        forked.watch(self)
        try:
            self.ffns = [self._ffn(i) for i in range(self._get("n_ffn"))]
        except BaseException:
            self.close()
            raise

    def _ffn(self, i: int) -> Ffn:
        ffn = _Ffn()
        self._do("ffn_get", i, ctypes.byref(ffn))
        by_level = tuple(ffn.neuron_bytes), tuple(ffn.neuron_errors)
        return Ffn(ffn.layer, ffn.n_ff, ffn.n_bytes, *by_level, ffn.block)

    @property
    def handle(self) -> ctypes.c_void_p:
        """The ``coreinfer_context *``.

        Raises:
            ArgumentError: it is freed, or left with the process that this one was forked from.
        """
        if not self._handle:
            raise ArgumentError(self._gone)
        return self._handle

    def _do(self, name: str, *arguments: Any) -> None:
        """Call a native function that gives a status."""
        with self._lock:
            _check(getattr(self._lib, f"coreinfer_{name}")(self.handle, *arguments))

    def _get(self, name: str) -> int:
        """Call a native function that gives a number."""
        with self._lock:
            return int(getattr(self._lib, f"coreinfer_{name}")(self.handle))

    def close(self) -> None:
        """Free the core set and detach; the llama_context may be gone already."""
        with self._lock:
            if self._handle:
                self._lib.coreinfer_free(self._handle)
                self._handle = ctypes.c_void_p()

    def abandon(self, reason: str) -> None:
        """Let go of the native context without freeing it; see ``forked``."""
        self._lock = threading.RLock()
        self._handle = ctypes.c_void_p()
        self._gone = reason

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise NotCopyableError("a core context cannot be pickled or copied: make another one")

    def collect(self, on: bool, extra: Extra | None = None) -> None:
        """Start or stop adding each evaluated token to the statistics."""
        extra = extra or Extra()
        which = (_NORMALIZED if extra.normalized else 0) | (_TOP if extra.top_share else 0)
        which |= _ACTIVE if extra.active else 0
        self._do("stats_collect", on, which, extra.top_share)
        self._extra = extra

    def clear_statistics(self) -> None:
        """Forget all tokens so far."""
        self._do("stats_clear")

    def statistics(self) -> Statistics:
        """The statistics of the tokens since the last clearing."""
        n_tokens = np.zeros(len(self.ffns), dtype=np.float32)
        sums: tuple[list[Floats], ...] = ([], [], [], [], [])
        for i, ffn in enumerate(self.ffns):
            arrays = [np.empty(ffn.n_ff, dtype=np.float32) for _ in sums]
            stats = _Stats(*map(_floats, arrays), 0.0)
            self._do("stats_get", i, ctypes.byref(stats))
            n_tokens[i] = stats.n_tokens
            for kind, array in zip(sums, arrays, strict=True):
                kind.append(array)
        total, square, normalized, top, active = sums
        return Statistics(
            total, square, normalized, top, n_tokens, active if self._extra.active else []
        )

    def down_norms(self) -> list[Floats]:
        """Squared Euclidean norms of the columns of ffn_down, per FFN [n_ff]. Reads the file."""
        widths = [ffn.n_ff for ffn in self.ffns]
        norms = np.empty(sum(widths), dtype=np.float32)
        self._do("down_norms", _floats(norms))
        return np.split(norms, np.cumsum(widths[:-1]))

    def set_core(self, core: Mapping[int, CoreSet]) -> None:
        """Gather core sets, by index of the FFN; an FFN not named stays dense.

        Raises:
            ModelFileError: the file can no longer be read.
            InsufficientMemoryError: there is no room for the compact tensors.
        """
        cores = (_Core * len(core))()
        arrays: list[npt.NDArray[Any] | None] = []  # kept alive until the call is over
        for native_core, (i, (neurons, fill, levels)) in zip(cores, core.items(), strict=True):
            indices = np.ascontiguousarray(neurons, dtype=np.int32)
            values = None if fill is None else np.ascontiguousarray(fill, dtype=np.float32)
            if not 0 <= i < len(self.ffns) or (
                values is not None and values.shape != (self.ffns[i].n_ff,)
            ):
                raise ArgumentError(f"core set of FFN {i}: no such FFN, or fill is not [n_ff]")
            of_each = None if levels is None else np.ascontiguousarray(levels, dtype=np.uint8)
            if of_each is not None and of_each.shape != indices.shape:
                raise ArgumentError(f"core set of FFN {i}: levels is not [n_core]")
            arrays += [indices, values, of_each]
            native_core.ffn = i
            native_core.n_neurons = len(indices)
            native_core.neurons = indices.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            native_core.fill = _floats(values)
            if of_each is not None:
                native_core.levels = of_each.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        self._do("core_set", cores, len(core))

    def use_core(self, on: bool) -> None:
        """Evaluate with the core set from now on, or dense."""
        self._do("core_use", on)

    def use_draft(self) -> None:
        """Evaluate with the core set, collecting nothing; ``use_verify`` keeps this graph."""
        self._do("graph_use", _DRAFT)

    def use_verify(self, there: bool = False) -> None:
        """Evaluate dense; on the CPU each token gets the bits that it has as the only one.

        Args:
            there: the device of a layer computes its FFN although the weights are in main memory.
        """
        self._do("graph_use", _VERIFY_THERE if there else _VERIFY)

    def stream_ahead(self, n_bytes: int) -> None:
        """Set how many bytes of the weights in the file are read before they are needed."""
        self._do("stream_ahead", n_bytes)

    def begin_stream(self, n_passes: int) -> None:
        """Start reading weights for ``n_passes`` evaluations of the graph."""
        self._do("stream_begin", n_passes)

    def end_stream(self) -> Streamed:
        """Stop reading, and free the buffers.

        Raises:
            ModelFileError: reading failed, and the results of the evaluations are wrong.
        """
        stream = _Stream()
        self._do("stream_end", ctypes.byref(stream))
        return Streamed(stream.n_bytes, stream.read_seconds, stream.waited_seconds)

    @property
    def core_bytes(self) -> int:
        """Bytes of FFN weights that decoding a token with the core set reads."""
        return self._get("core_bytes")

    @property
    def full_bytes(self) -> int:
        """Bytes of all FFN weights of the model."""
        return sum(ffn.n_bytes for ffn in self.ffns)
