"""Measures how fast a device is: memory, weights by our kernels or ggml's, layers, the disk."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import platformdirs

from coreinfer_edge.doctor.models import Rates
from coreinfer_edge.measure.machine import read_bandwidth
from coreinfer_edge.measure.random_llama import (
    Bytes,
    Shape,
    Spec,
    Weights,
    add_metadata,
    encode,
    new_writer,
    typed_tensors,
    write,
)
from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.run.process_memory import available_bytes

# What is read must not fit into a cache, nor fill a small device.
LEAST_BYTES, MOST_BYTES = 32 << 20, 160 << 20
MEMORY_PART = 8

# The types that are measured; ``Rates.of`` says which stand for others.
YARDSTICKS = ("q4_0", "q4_k", "q8_0")

# Models of hardly any weights: what they take is what layers, or a vocabulary, take besides.
_LAYERS = Shape(24, 64, 128, 2, 2, 320)
_VOCABULARY = Shape(1, 64, 128, 2, 2, 1 << 14, tied=True)

BURST_SECONDS = 0.04
BURSTS = 10

_CHUNK = 1 << 20
_DISK_BYTES = 96 << 20
_DISK_SECONDS = 0.7
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")


@dataclass(frozen=True)
class Disk:
    """How fast a file can be read that is not in memory.

    Attributes:
        bytes_per_second: in large pieces, one after the other, as streaming reads.
        how: ``"past the page cache"`` (O_DIRECT), or ``"page cache dropped"``, which can be too
            fast where the disk's host keeps pages.
        file: ``"the model"`` or ``"a temporary file"``.
    """

    bytes_per_second: float
    how: str
    file: str


def read_bytes(cache_bytes: int) -> int:
    """How many bytes to measure with: beyond the cache, and a small part of the memory."""
    wanted = min(MOST_BYTES, max(LEAST_BYTES, 4 * cache_bytes))
    return max(1 << 20, min(wanted, available_bytes()[0] // MEMORY_PART))


def measure(threads: int, cache_bytes: int) -> Rates:
    """Measure memory and kernels with so many threads; a second or two on a fast device."""
    n_bytes = read_bytes(cache_bytes)
    memory = read_bandwidth(threads, n_bytes)
    layer_seconds = _token_seconds(_LAYERS, "f32", threads) / _LAYERS.n_layer
    vocabulary = max(0.0, _token_seconds(_VOCABULARY, "q8_0", threads) - layer_seconds)
    rates = Rates(memory, {}, layer_seconds, vocabulary / _VOCABULARY.n_vocab)
    for type in YARDSTICKS:
        shape, weight_bytes = yardstick(type, n_bytes)
        seconds = _token_seconds(shape, type, threads)
        # other programs can have been busier while layers were measured
        seconds = max(seconds / 2, seconds - shape.n_layer * layer_seconds)
        rates = replace(rates, weights={**rates.weights, type: weight_bytes / seconds})
    return rates


def yardstick(type: str, n_bytes: int) -> tuple[Shape, int]:
    """A model of about so many bytes of weights of a type, and those that a token reads."""
    width, layers = 1024, 2
    shape = Shape(layers, width, 256, 8, 8, 320)

    def size(shape: Shape) -> int:
        read = (spec for spec in typed_tensors(shape, type) if not spec.name.startswith("token"))
        return sum(spec.n_bytes for spec in read)

    of_neuron = (size(replace(shape, n_ff=512)) - size(shape)) / 256
    n_ff = max(256, round((n_bytes - size(shape)) / of_neuron / 256) * 256)
    shape = replace(shape, n_ff=n_ff)
    return shape, size(shape)


class _Repeated(Weights):
    """The same few quantised weights again and again: speed does not depend on them."""

    def chunks(self, spec: Spec) -> Iterator[Bytes]:
        n = min(spec.n_elements, 1 << 15)
        some = encode(np.random.default_rng(0).normal(0, spec.std, (n,)).astype("f4"), spec.type)
        yield np.resize(some, spec.n_bytes)


def _token_seconds(shape: Shape, type: str, threads: int) -> float:
    """What a token takes at best, of a model of this shape that is made for this."""
    specs = typed_tensors(shape, type)
    room = 2 * sum(spec.n_bytes for spec in specs)
    with tempfile.TemporaryDirectory(dir=_memory_folder(room)) as folder:
        path = Path(folder) / "model.gguf"
        writer = new_writer(path, "llama", shape, type)
        add_metadata(writer, shape)
        write(writer, path, specs, weights=_Repeated(0))
        with EdgeLLM(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads) as llm:
            return best_token_seconds(llm, 1, 1000)


def best_token_seconds(llm: EdgeLLM, context: int, most_tokens: int) -> float:
    """The least seconds of a token of an answer, over a few bursts.

    Args:
        llm: the model.
        context: tokens of the prompt.
        most_tokens: that may be generated.
    """
    tokens = llm.llama.generate(list(range(5, 5 + context)), temp=0.0)
    try:
        next(tokens)  # the prompt

        def burst(n: int) -> float:
            start = time.perf_counter()
            for _ in range(n):
                next(tokens)
            return (time.perf_counter() - start) / n

        burst(1)  # builds the graph, and wakes the threads
        start, best = time.perf_counter(), burst(2)
        n = max(1, min((most_tokens - 4) // BURSTS, int(BURST_SECONDS / best)))
        for _ in range(BURSTS):
            best = min(best, burst(n))
            if time.perf_counter() - start > 2 * BURSTS * BURST_SECONDS:
                break  # a slow device
        return best
    finally:
        tokens.close()


def _memory_folder(room: int) -> str | None:
    """Where files are in memory, if there is room: a card would be slow, and wear out."""
    folder = "/dev/shm"
    with suppress(OSError):
        if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > room:
            return folder
    return None


# --- the disk ------------------------------------------------------------------------------------


def measure_disk(model: Path | None = None) -> Disk | None:
    """How fast weights can be streamed from a model's file, or from where models are kept.

    None where no file can be written, or everything is in memory.
    """
    if model is not None:
        return _read(model, "the model")
    for folder in (platformdirs.user_cache_path("coreinfer-edge"), Path(tempfile.gettempdir())):
        with suppress(OSError), _temporary_file(folder) as path:
            if _file_system(path) not in _MEMORY_FILE_SYSTEMS:
                return _read(path, "a temporary file")
    return None


@contextmanager
def _temporary_file(folder: Path) -> Iterator[Path]:
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="doctor-") as file:
            chunk = os.urandom(4 * _CHUNK)
            start = time.perf_counter()
            for _ in range(_DISK_BYTES // 2 // len(chunk)):
                file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
                if time.perf_counter() - start > 2 * _DISK_SECONDS:
                    break  # a slow card: what is written has to do
            yield Path(file.name)
    finally:
        if made:
            with suppress(OSError):
                folder.rmdir()


def _read(path: Path, file: str) -> Disk | None:
    if not hasattr(os, "O_DIRECT") or not hasattr(os, "preadv"):  # Windows, macOS
        return None
    for flags, how in ((os.O_DIRECT, "past the page cache"), (0, "page cache dropped")):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | flags)
            try:
                if not flags:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                n_bytes, seconds = _timed_read(descriptor)
            finally:
                os.close(descriptor)
            if n_bytes >= _CHUNK:
                return Disk(n_bytes / max(1e-9, seconds), how, file)
    return None


def _timed_read(descriptor: int) -> tuple[int, float]:
    """Bytes read in whole chunks, and the seconds that it took."""
    total, start = 0, time.perf_counter()
    with mmap.mmap(-1, 4 * _CHUNK) as buffer:  # O_DIRECT wants aligned memory
        while total < _DISK_BYTES and time.perf_counter() - start < _DISK_SECONDS:
            n = os.preadv(descriptor, [buffer], total)
            total += n
            if n < len(buffer):
                break
        return total, time.perf_counter() - start


def _file_system(path: Path) -> str:
    """The kind of file system that a file is on, "" where the system does not say."""
    try:
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[2] == wanted:
                return fields[fields.index("-") + 1]
    except (OSError, ValueError, IndexError):
        pass
    return ""
