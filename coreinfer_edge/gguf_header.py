"""Reads and checks the header of a GGUF file, so that llama.cpp never sees one it would die of.

llama.cpp trusts a file in places: a wrong count, type or range there ends the process (an assertion
in ggml) instead of an error. So a file passes three gates before it is loaded:

1. ``_scan`` walks the header in Python, with limits, and knows where in the file it is. It finds
   what is cut off, absurd, or not a GGUF at all.
2. ggml's own reader, the one llama.cpp uses, has the last word on what a valid GGUF is.
3. ``check_loadable`` refuses metadata that is valid GGUF but that libllama asserts on.

File format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import re
import stat
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from coreinfer_edge.errors import (
    CoreInferError,
    InsufficientMemoryError,
    ModelFileError,
    UnsupportedModelError,
)

MAX_HEADER_BYTES = 256 * 1024**2
MAX_ARRAY_STRINGS = 4 * 1024**2
MAX_ARRAY_ELEMENTS = 1024**3
# ggml's CPU buffers, mapped files among them, start at a multiple of this.
TENSOR_ALIGNMENT = 32

_SCALARS = {
    0: ("u8", "<B"),
    1: ("i8", "<b"),
    2: ("u16", "<H"),
    3: ("i16", "<h"),
    4: ("u32", "<I"),
    5: ("i32", "<i"),
    6: ("f32", "<f"),
    7: ("bool", "<?"),
    10: ("u64", "<Q"),
    11: ("i64", "<q"),
    12: ("f64", "<d"),
}
_STRING, _ARRAY = 8, 9

Scalar = int | float | bool | str


class GGUFArray(NamedTuple):
    """An array among the metadata. Only where it lies is kept; ``read`` fetches its values."""

    type: str
    length: int
    path: Path
    offset: int

    def read(self) -> npt.NDArray[Any] | list[bytes]:
        """The values: a numpy array of numbers, or a list of byte strings.

        Raises:
            ModelFileError: the file can no longer be read.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                if self.type != "str":
                    dtype = np.dtype(dict(_SCALARS.values())[self.type])
                    data = file.read(self.length * dtype.itemsize)
                    return np.frombuffer(data, dtype=dtype, count=self.length)
                strings = []
                for _ in range(self.length):
                    (size,) = struct.unpack("<Q", file.read(8))
                    strings.append(file.read(min(size, MAX_HEADER_BYTES)))
                return strings
        except (OSError, struct.error, ValueError) as error:
            raise ModelFileError(
                f"{self.path} changed while it was being read ({error}): try again"
            ) from error


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of the file.

    Attributes:
        name: e.g. ``"blk.0.ffn_up.weight"``.
        type: ggml's name of the element type, e.g. ``"q4_K"``.
        shape: elements per dimension in ggml's order, the contiguous one first.
        file: the file it lies in (a split GGUF has several).
        offset: bytes from the start of that file.
        n_bytes: size of the data.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    n_bytes: int

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=object)) if self.shape else 1


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says about itself: metadata and tensors, without their data.

    Attributes:
        path: the file (the first one of a split GGUF).
        files: all files, ``path`` first.
        file_size: bytes in all files.
        version: GGUF version, 2 or 3.
        architecture: ``general.architecture``, e.g. ``"llama"``.
        alignment: bytes that tensor data is aligned to.
        metadata: all keys in file order. Arrays are ``GGUFArray``, read on demand.
        value_types: the GGUF type of each key, e.g. ``"u32"``, ``"str"`` or ``"arr"``.
        tensors: all tensors by name, in file order.
    """

    path: Path
    files: tuple[Path, ...]
    file_size: int
    version: int
    architecture: str
    alignment: int
    metadata: Mapping[str, Scalar | GGUFArray] = field(repr=False)
    value_types: Mapping[str, str] = field(repr=False)
    tensors: Mapping[str, GGUFTensor] = field(repr=False)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key, or ``default`` where there is none."""
        return self.metadata.get(key, default)

    def of_architecture(self, key: str) -> Scalar | GGUFArray | None:
        """The value of ``<architecture>.<key>``, e.g. of ``block_count``."""
        return self.metadata.get(f"{self.architecture}.{key}")

    @property
    def n_layers(self) -> int:
        """Number of layers, 0 where the file does not say."""
        count = self.of_architecture("block_count")
        return count if isinstance(count, int) else 0


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read the header of a GGUF file, and of the other files where it is split.

    Args:
        path: a file on disk; of a split GGUF, the first file.

    Raises:
        ModelFileError: the file is missing, unreadable, no GGUF, cut off or damaged.
    """
    path = Path(path)
    first = _read_part(path)
    parts = [first, *_read_other_parts(path, first)]
    architecture = first.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise ModelFileError(
            f"{path} does not name its architecture (no text under the key general.architecture),"
            " so it is not a language model that llama.cpp can run: convert the model again"
        )
    tensors: dict[str, GGUFTensor] = {}
    for part in parts:
        for tensor in part.tensors:
            if tensor.name in tensors:
                raise ModelFileError(
                    f"{part.path} holds tensor {tensor.name} again, already in"
                    f" {tensors[tensor.name].file}: the files do not belong together, download"
                    " them again"
                )
            tensors[tensor.name] = tensor
    return GGUFHeader(
        path=path,
        files=tuple(part.path for part in parts),
        file_size=sum(part.size for part in parts),
        version=first.version,
        architecture=architecture,
        alignment=first.alignment,
        metadata=first.metadata,
        value_types=first.value_types,
        tensors=tensors,
    )


class _Part(NamedTuple):
    """One file of a GGUF."""

    path: Path
    size: int
    version: int
    alignment: int
    metadata: dict[str, Scalar | GGUFArray]
    value_types: dict[str, str]
    tensors: list[GGUFTensor]


class _TensorInfo(NamedTuple):
    """A tensor as the file lists it, its type still a number."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


class _Scan(NamedTuple):
    """Result of walking one file's header."""

    version: int
    metadata: dict[str, Scalar | GGUFArray]
    value_types: dict[str, str]
    tensors: list[_TensorInfo]
    end: int


def _read_part(path: Path) -> _Part:
    """Take one file through the first two gates."""
    size = _regular_file_size(path)
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            scan = _Scanner(path, data).scan()
    except OSError as error:
        raise _unreadable(path, error) from error
    _ask_ggml(path)
    alignment = scan.metadata.get("general.alignment", 32)
    assert isinstance(alignment, int)  # ggml's reader has checked that it is a u32
    data_start = -(-scan.end // alignment) * alignment if scan.tensors else scan.end
    tensors = [
        GGUFTensor(
            name=info.name,
            type=_type_traits(info.type).name,
            shape=info.shape,
            file=path,
            offset=data_start + info.offset,
            n_bytes=_type_traits(info.type).n_bytes(info.shape),
        )
        for info in scan.tensors
    ]
    for tensor in tensors:
        missing = tensor.offset + tensor.n_bytes - size
        if missing > 0:
            needed = max(t.offset + t.n_bytes for t in tensors)
            raise ModelFileError(
                f"{path} is cut off: it has {size:,} bytes, and the tensors it lists need"
                f" {needed:,}, so {needed - size:,} are missing (from tensor {tensor.name} on):"
                " download it again"
            )
    return _Part(path, size, scan.version, alignment, scan.metadata, scan.value_types, tensors)


_SPLIT_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def _read_other_parts(path: Path, first: _Part) -> Iterator[_Part]:
    """Read the other files of a split GGUF, those that llama.cpp goes on to load by name."""
    count = first.metadata.get("split.count", 1)
    if count in (0, 1):
        return
    if first.value_types["split.count"] != "u16" or first.value_types.get("split.no") != "u16":
        raise ModelFileError(
            f"{path} has a damaged split.count or split.no (a u16 each): download it again"
        )
    number = first.metadata["split.no"]
    assert isinstance(number, int)
    assert isinstance(count, int)
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise ModelFileError(
            f"{path} is one of {count} files of a split GGUF, and llama.cpp finds the others by"
            f" its name, which must look like NAME-00001-of-{count:05}.gguf: rename it back"
        )
    names = [f"{match['prefix']}-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    if number != 0 or path.name != names[0]:
        raise ModelFileError(
            f"{path} is file {number + 1} of {count} of a split GGUF: name the first one,"
            f" {path.with_name(names[0])}"
        )
    missing = [name for name in names if not path.with_name(name).exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelFileError(
            f"{path} is the first of {count} files of a split GGUF, and beside it there is no"
            f" {', '.join(missing[:3])}{more}: download all of them into one folder"
        )
    for i, name in enumerate(names[1:], start=1):
        part = _read_part(path.with_name(name))
        if part.value_types.get("split.no") != "u16" or part.metadata["split.no"] != i:
            raise ModelFileError(
                f"{part.path} says that it is not file {i + 1} of {count} (key split.no):"
                " download the files again"
            )
        yield part


def _regular_file_size(path: Path) -> int:
    """Size of a regular file. Opening a FIFO or a device could block for ever."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if stat.S_ISDIR(status.st_mode):
        try:
            names = sorted(p.name for p in path.iterdir() if p.suffix == ".gguf")
        except OSError:
            names = []
        found = f" (it has {', '.join(names[:3])})" if names else ""
        raise ModelFileError(f"{path} is a directory: name the .gguf file in it{found}")
    if not stat.S_ISREG(status.st_mode):
        raise ModelFileError(
            f"{path} is not a regular file but a device, pipe or socket: name a .gguf file on disk"
        )
    if status.st_size == 0:
        raise ModelFileError(f"{path} is empty: download it again")
    return status.st_size


def _unreadable(path: Path, error: Exception) -> CoreInferError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ModelFileError(f"{path} does not exist: check the path of the model file")
    if isinstance(error, PermissionError):
        return ModelFileError(f"{path} may not be read: give yourself permission to read it")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return InsufficientMemoryError(f"{path} cannot be mapped ({reason}): free some memory")
    return ModelFileError(f"{path} cannot be read ({reason}): check the path and the disk")


class _Scanner:
    """Walks one header, and knows at each point what it is reading."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.pos = 0
        self.place = "its first bytes"

    def scan(self) -> _Scan:
        if self.data[:4] != b"GGUF":
            if b"GGUF".startswith(self.data[:4]):
                self.need(4)
            what = _seems_to_be(self.data[:512])
            raise ModelFileError(
                f"{self.path} is not a GGUF file{what}: name a .gguf file, or download it again"
            )
        self.pos = 4
        version = self.number("<I")
        if version & 0xFFFF == 0:
            raise ModelFileError(
                f"{self.path} is a GGUF for big-endian machines, and this one is"
                f" {sys.byteorder}-endian: get or convert the model for this machine"
            )
        if version not in (2, 3):
            raise ModelFileError(
                f"{self.path} is GGUF version {version}; versions 2 and 3 can be read: "
                + ("convert the model again" if version < 2 else "update coreinfer-edge")
            )
        # The least that one tensor and one key take: lengths, types and counts with no content.
        n_tensors = self.count("tensors", least_bytes=24)
        n_keys = self.count("metadata keys", least_bytes=14)
        metadata: dict[str, Scalar | GGUFArray] = {}
        value_types: dict[str, str] = {}
        for i in range(n_keys):
            self.place = f"metadata key {i + 1} of {n_keys}"
            key = self.text()
            self.place += f" ({key[:64]})"
            kind = self.number("<I")
            metadata[key] = self.value(kind)
            value_types[key] = "arr" if kind == _ARRAY else _type_name(kind)
        tensors = [self.tensor_info(i, n_tensors) for i in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if tensors and isinstance(alignment, int) and alignment > 0:
            self.place = "the padding before the data of the tensors"
            self.need(-self.pos % alignment)
        return _Scan(version, metadata, value_types, tensors, self.pos)

    def tensor_info(self, i: int, n_tensors: int) -> _TensorInfo:
        self.place = f"the entry of tensor {i + 1} of {n_tensors}"
        name = self.text()
        n_dims = self.number("<I")
        if n_dims > 4:
            raise self.damaged(f"{n_dims} dimensions, and 4 is the most")
        shape = tuple(self.number("<Q") for _ in range(n_dims))
        return _TensorInfo(name, shape, self.number("<I"), self.number("<Q"))

    def value(self, kind: int) -> Scalar | GGUFArray:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise self.damaged(f"the unknown value type {kind}")
            value: Scalar = self.number(_SCALARS[kind][1])
            return value
        kind = self.number("<I")
        length = self.number("<Q")
        start = self.pos
        if kind == _STRING:
            if length > MAX_ARRAY_STRINGS:
                raise self.damaged(f"{length:,} strings, and {MAX_ARRAY_STRINGS:,} are allowed")
            self.skip_strings(length)
        elif kind in _SCALARS:
            if length > MAX_ARRAY_ELEMENTS:
                raise self.damaged(f"{length:,} numbers, and {MAX_ARRAY_ELEMENTS:,} are allowed")
            n_bytes = length * struct.calcsize(_SCALARS[kind][1])
            self.need(n_bytes)
            self.pos += n_bytes
        else:
            raise self.damaged(f"an array of the unknown value type {kind}")
        return GGUFArray(_type_name(kind), length, self.path, start)

    def skip_strings(self, n: int) -> None:
        self.need(8 * n)
        unpack = struct.Struct("<Q").unpack_from
        data, pos, limit = self.data, self.pos, min(self.size, MAX_HEADER_BYTES) - 8
        for _ in range(n):
            if pos > limit:
                break
            pos += 8 + unpack(data, pos)[0]
        else:
            self.need(pos - self.pos)
            self.pos = pos
            return
        # The loop has run over the end; need() finds the words for it.
        self.need(max(pos + 8, self.size + 1) - self.pos)

    def count(self, what: str, least_bytes: int) -> int:
        self.place = f"the number of {what}"
        n: int = self.number("<q")
        if n < 0 or n * least_bytes > MAX_HEADER_BYTES:
            raise self.damaged(f"{n:,} {what}")
        return n

    def text(self) -> str:
        length = self.number("<Q")
        if length > MAX_HEADER_BYTES:
            raise self.damaged(f"a text of {length:,} bytes")
        self.need(length)
        self.pos += length
        return self.data[self.pos - length : self.pos].decode("utf-8", "replace")

    def number(self, code: str) -> Any:
        n_bytes = struct.calcsize(code)
        self.need(n_bytes)
        (value,) = struct.unpack_from(code, self.data, self.pos)
        self.pos += n_bytes
        return value

    def need(self, n_bytes: int) -> None:
        """Raise unless so many bytes follow, within the file and the limit for headers."""
        end = self.pos + n_bytes
        if end > MAX_HEADER_BYTES:
            raise self.damaged(f"{end:,} bytes of header, and {MAX_HEADER_BYTES:,} are allowed")
        if end > self.size:
            raise ModelFileError(
                f"{self.path} is cut off: it has {self.size:,} bytes and ends within {self.place},"
                f" where at least {end - self.size:,} more are needed: download it again"
            )

    def damaged(self, what: str) -> ModelFileError:
        return ModelFileError(
            f"{self.path} is damaged: at byte {self.pos:,}, {self.place} claims {what}:"
            " download it again"
        )


def _type_name(kind: int) -> str:
    return "str" if kind == _STRING else _SCALARS[kind][0]


def _seems_to_be(start: bytes) -> str:
    """Name what people take for a GGUF file, or give them in its stead."""
    text = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer, so the model itself was not fetched (git lfs pull)"
    elif start[8:10] in (b'{"', b"{ ") and int.from_bytes(start[:8], "little") < 1 << 32:
        what = "a safetensors file, which must be converted to GGUF first"
    elif start.startswith(b"PK\x03\x04"):
        what = "a PyTorch checkpoint or another ZIP archive, which must be converted to GGUF first"
    elif start[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05"):
        what = "a Python pickle (an old PyTorch checkpoint), which must be converted to GGUF first"
    elif text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        what = "a web page, perhaps an error or a log-in page in place of the model"
    elif start[:4] in (b"tjgg", b"fmgg", b"lmgg", b"algg", b"ggjt", b"ggmf", b"ggml", b"ggla"):
        what = "a GGML file from before GGUF, which must be converted again"
    elif start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf")):
        what = "a compressed archive, which must be unpacked first"
    elif not start.strip(b"\0"):
        what = "a download that was never finished (it starts with zero bytes)"
    elif text.startswith(b"{"):
        what = "JSON text"
    elif text and all(9 <= byte < 127 for byte in text):
        what = "text: " + repr(start.strip()[:40].decode())
    else:
        return f" (it starts with {start[:4]!r})"
    return f" but seems to be {what}"


class _TypeTraits(NamedTuple):
    """What ggml knows of an element type."""

    name: str
    block_elements: int
    block_bytes: int

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        elements = 1
        for n in shape:
            elements *= n
        return elements // self.block_elements * self.block_bytes


@functools.cache
def _ggml() -> ctypes.CDLL:
    """ggml-base, with the few functions used here declared."""
    from coreinfer_edge import native

    lib = native.load_library("ggml-base")
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    lib.gguf_free.restype = None
    lib.gguf_free.argtypes = [ctypes.c_void_p]
    lib.ggml_type_name.restype = ctypes.c_char_p
    lib.ggml_type_name.argtypes = [ctypes.c_int]
    lib.ggml_blck_size.restype = ctypes.c_int64
    lib.ggml_blck_size.argtypes = [ctypes.c_int]
    lib.ggml_type_size.restype = ctypes.c_size_t
    lib.ggml_type_size.argtypes = [ctypes.c_int]
    return lib


class _InitParams(ctypes.Structure):
    """``struct gguf_init_params`` of gguf.h."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@functools.cache
def _type_traits(number: int) -> _TypeTraits:
    """Traits of a type number that ggml's reader has let through (it asserts on others)."""
    lib = _ggml()
    return _TypeTraits(
        lib.ggml_type_name(number).decode(),
        lib.ggml_blck_size(number),
        lib.ggml_type_size(number),
    )


_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_log_lock = threading.RLock()


@functools.cache
def _log_functions() -> tuple[tuple[Any, Any], ...]:
    """Getter and setter of the log callbacks: libllama's, which sets ggml's too, then ggml's."""
    from coreinfer_edge import native

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
def captured_log() -> Iterator[list[str]]:
    """Collect what ggml and llama.cpp log in a list, in place of their callbacks of the moment.

    The callbacks are the whole process's: lines of other threads land in the list too.
    """
    lines: list[str] = []
    callback = _LogCallback(
        lambda _level, text, _data: lines.append(text.decode("utf-8", "replace"))
    )
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


def _ask_ggml(path: Path) -> None:
    """Raise unless ggml's own reader accepts the header."""
    name = str(path).encode() if os.name == "nt" else os.fsencode(path)
    lib = _ggml()
    with captured_log() as lines:
        context = lib.gguf_init_from_file(name, _InitParams(True, None))
        if context:
            lib.gguf_free(context)
    if not context:
        reasons = [line.split(": ", 1)[-1].strip() for line in lines]
        raise ModelFileError(
            f"{path} is damaged: {'; '.join(reasons) or 'ggml cannot read its header'}:"
            " download or convert it again"
        )


# --- the third gate: valid GGUF that libllama dies of --------------------------------------------

# llama-hparams.h
MAX_LAYERS = 512
MAX_EXPERTS = 1024
# Far beyond any model; at 2**31 the size of the cache overflows.
MAX_WINDOW = 2**26

_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
# Numbers for other uses, and what ggml quantises activations to.
_NEVER_WEIGHTS = ("i8", "i16", "i32", "i64", "f64", "q8_1", "q8_K")
_EPSILONS = (
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
    "attention.group_norm_epsilon",
)
# The tokenizers of encoders (BERT, T5), of files with no vocabulary, of llama.cpp's own tests, and
# of RWKV, which has no FFN for us and whose tokenizer throws through the C API.
_NO_TEXT_TOKENIZERS = ("bert", "t5", "rwkv", "no_vocab", "none", "test")
# Beginning and end of a text where the file names none (llama-vocab.cpp, "default special tokens").
_DEFAULT_BOS_EOS = {"llama": (1, 2), "plamo2": (1, 2), "gpt2": (11, 11)}
# llama-vocab.cpp sets add_bos for these where the file does not say.
_PRE_WITH_BOS = (
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
    "chameleon",
)
# Their graphs assert that rope turns the whole head (src/models, "n_embd_head == n_rot").
# fmt: off
_TURNS_WHOLE_HEADS = frozenset({
    "apertus", "arcee", "arctic", "baichuan", "chameleon", "codeshell", "cogvlm", "cohere2moe",
    "dbrx", "deci", "deepseek", "dots1", "dream", "ernie4_5", "ernie4_5-moe", "exaone",
    "exaone-moe", "exaone4", "falcon", "granite", "granite_swa", "graniteswitch", "grok",
    "grovemoe", "hunyuan-moe", "hunyuan_vl", "hy_v3", "internlm2", "jais2", "llada", "llada-moe",
    "llama", "llama4", "maincoder", "mellum", "mistral3", "olmo", "olmo2", "olmoe", "orion",
    "paddleocr", "pangu-embedded", "plamo", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe",
    "qwen3vl", "qwen3vlmoe", "rnd1", "seed_oss", "smallthinker", "smollm3", "starcoder2",
    "talkie", "xverse",
})
# Every layer of theirs has attention, with keys and values of one size.
_ATTENTION_ONLY = _TURNS_WHOLE_HEADS - {"deci"} | {
    "bitnet", "bloom", "chatglm", "cohere2", "command-r", "gemma", "gemma2", "gemma3", "glm4",
    "gpt2", "gptneox", "jais", "mpt", "nemotron", "openelm", "phi2", "phi3", "qwen", "refact",
    "stablelm", "starcoder",
}
# fmt: on


def check_loadable(header: GGUFHeader) -> None:
    """Refuse what llama.cpp would not survive, or cannot run. The data of tensors is not read.

    Every rule stands for an assertion in libllama or ggml that a file can reach. What libllama
    reports as an error by itself (missing keys, wrong value types, missing tensors) is left to it.

    Raises:
        UnsupportedModelError: llama.cpp does not know the architecture, or the model is none that
            continues text.
        ModelFileError: the metadata contradicts itself.
    """
    _check_architecture(header)
    _check_sizes(header)
    _check_attention(header)
    _check_experts(header)
    _check_tensor_types(header)
    _check_vocabulary(header)


def _damaged(header: GGUFHeader, what: str) -> ModelFileError:
    return ModelFileError(f"{header.path} is damaged: {what}; download or convert it again")


def _check_architecture(header: GGUFHeader) -> None:
    if not _llama_knows(header.architecture):
        raise UnsupportedModelError(
            f"{header.path} holds a model of the architecture {header.architecture[:64]!r}, which"
            " this version of llama.cpp does not know: choose another model, or update"
            " coreinfer-edge"
        )
    if header.architecture == "clip":
        raise UnsupportedModelError(
            f"{header.path} holds the image encoder of a model (architecture 'clip'), which cannot"
            " generate text: name the file of the language model"
        )


def _check_sizes(header: GGUFHeader) -> None:
    layers = header.of_architecture("block_count")
    if isinstance(layers, int) and not 0 < layers <= MAX_LAYERS:
        raise _damaged(header, f"it claims {layers:,} layers, and 1 to {MAX_LAYERS} can be")
    extra = header.of_architecture("nextn_predict_layers")
    if isinstance(extra, int) and isinstance(layers, int) and extra > layers:
        raise _damaged(header, f"{extra:,} of its {layers} layers predict further tokens")
    for key in _EPSILONS:
        epsilon = header.of_architecture(key)
        if isinstance(epsilon, float) and not 0 <= epsilon < float("inf"):
            raise _damaged(header, f"{key} is {epsilon}, and must not be negative")
    scaling = header.of_architecture("rope.scaling.type")
    if isinstance(scaling, str) and scaling not in _ROPE_SCALINGS:
        raise UnsupportedModelError(
            f"{header.path} scales its positions by {scaling[:64]!r} (key rope.scaling.type), and"
            f" llama.cpp knows {', '.join(_ROPE_SCALINGS)}: choose another model"
        )
    if header.alignment % TENSOR_ALIGNMENT:
        raise _damaged(
            header,
            f"its tensors are aligned to {header.alignment} bytes, and a mapped file needs"
            f" {TENSOR_ALIGNMENT}",
        )


def _check_attention(header: GGUFHeader) -> None:
    heads = _int(header, "attention.head_count")
    by_default = _int(header, "embedding_length") // heads if heads else 0
    for window in ("", "_swa"):
        head_size = _int(header, f"attention.key_length{window}", by_default)
        turned = _int(header, f"rope.dimension_count{window}", head_size)
        full = header.architecture in _TURNS_WHOLE_HEADS
        if head_size and not (
            0 < turned <= head_size and turned % 2 == 0 and (turned == head_size or not full)
        ):
            raise _damaged(
                header,
                f"its positions turn {turned:,} elements of each head (rope.dimension_count"
                f"{window}), and a head has {head_size:,}",
            )
    key_size = _int(header, "attention.key_length", by_default)
    value_size = _int(header, "attention.value_length", by_default)
    attention_only = header.architecture in _ATTENTION_ONLY
    if attention_only and key_size != value_size:
        raise _damaged(
            header, f"its heads have keys of {key_size:,} elements and values of {value_size:,}"
        )
    for heads, kv_heads in _heads_by_layer(header):
        if heads and (heads % kv_heads if kv_heads else attention_only):
            raise _damaged(
                header, f"{heads:,} attention heads cannot share {kv_heads:,} key-value heads"
            )
    for layer in range(header.n_layers - _int(header, "nextn_predict_layers")):
        names = (f"blk.{layer}.attn_qkv.weight", f"blk.{layer}.attn_q.weight")
        if attention_only and not any(name in header.tensors for name in names):
            raise _damaged(header, f"layer {layer} has no attention ({' or '.join(names)})")
    window_size = _int(header, "attention.sliding_window")
    if window_size > MAX_WINDOW:
        raise _damaged(
            header, f"attention.sliding_window is {window_size:,}, and {MAX_WINDOW:,} is the most"
        )
    pattern = header.of_architecture("attention.sliding_window_pattern")
    windowless = pattern == 1 or (
        isinstance(pattern, GGUFArray) and pattern.type != "str" and not any(pattern.read())
    )
    if window_size and windowless:
        raise _damaged(header, "it has a sliding window and, by its pattern, no layer that uses it")


def _heads_by_layer(header: GGUFHeader) -> Iterator[tuple[int, int]]:
    """Heads and key-value heads of each layer; the file has a number or an array of either."""
    counts = []
    for key in ("attention.head_count", "attention.head_count_kv"):
        value = header.of_architecture(key)
        if isinstance(value, GGUFArray) and value.type != "str":
            counts.append([int(n) for n in value.read()[:MAX_LAYERS]])
        elif isinstance(value, int):
            counts.append([value] * min(header.n_layers, MAX_LAYERS))
    if len(counts) == 2:
        yield from zip(*counts, strict=False)


def _check_tensor_types(header: GGUFHeader) -> None:
    for tensor in header.tensors.values():
        if tensor.type in _NEVER_WEIGHTS and "tid2eid" not in tensor.name:
            raise _damaged(
                header,
                f"tensor {tensor.name} is of the type {tensor.type}, which weights never are",
            )
        is_vector = max(tensor.shape, default=1) == tensor.n_elements
        if is_vector and tensor.type != "f32" and tensor.name.endswith((".bias", "norm.weight")):
            raise _damaged(
                header, f"tensor {tensor.name} is a vector of the type {tensor.type}, not f32"
            )


def _check_experts(header: GGUFHeader) -> None:
    experts = _int(header, "expert_count")
    used_value = header.of_architecture("expert_used_count")
    if isinstance(used_value, GGUFArray) and used_value.type != "str":
        used = max((int(n) for n in used_value.read()), default=0)
    else:
        used = _int(header, "expert_used_count")
    groups = _int(header, "expert_group_count")
    groups_used = _int(header, "expert_group_used_count")
    if header.architecture in ("hunyuan-vl", "hunyuan-dense") and experts <= 1:
        experts = used = 0
    if experts > MAX_EXPERTS:
        raise _damaged(header, f"it claims {experts:,} experts, and {MAX_EXPERTS} can be")
    if not (0 < used <= experts if experts else used == 0):
        raise _damaged(header, f"it uses {used:,} of {experts:,} experts")
    if groups and not (
        groups < experts and (groups == 1 or (experts % groups == 0 and 0 < groups_used < groups))
    ):
        raise _damaged(header, f"it uses {groups_used} of {groups} groups of {experts} experts")


def _int(header: GGUFHeader, key: str, default: int = 0) -> int:
    value = header.of_architecture(key)
    return value if isinstance(value, int) else default


def _check_vocabulary(header: GGUFHeader) -> None:
    model = header.get("tokenizer.ggml.model")
    if not isinstance(model, str) or model in _NO_TEXT_TOKENIZERS:
        raise UnsupportedModelError(
            f"{header.path} cannot generate text here (its tokenizer is {model!r}): choose a model"
            " that continues text, with one of llama.cpp's other tokenizers"
        )
    array = header.get("tokenizer.ggml.tokens")
    if not isinstance(array, GGUFArray) or array.type != "str" or array.length == 0:
        raise _damaged(header, "it lists no tokens under tokenizer.ggml.tokens")
    # As in C: a token ends at a zero byte, and an empty one gets a name of its own.
    tokens = {
        token.split(b"\0", 1)[0] or b"[EMPTY_%d]" % i for i, token in enumerate(_strings(array))
    }
    if len(tokens) < array.length:
        raise _damaged(
            header, f"{array.length - len(tokens):,} of its {array.length:,} tokens are there twice"
        )
    if model == "llama":
        for byte in range(256):
            if b"<0x%02X>" % byte not in tokens and bytes([byte]) not in tokens:
                raise UnsupportedModelError(
                    f"{header.path} has no token for the byte 0x{byte:02X}, and llama.cpp cannot"
                    " go on where a text has it: choose another conversion of the model"
                )
    _check_special_tokens(header, model, array.length)


def _strings(array: GGUFArray) -> list[bytes]:
    values = array.read()
    assert isinstance(values, list)
    return values


def _check_special_tokens(header: GGUFHeader, model: str, n_tokens: int) -> None:
    defaults = _DEFAULT_BOS_EOS.get(model, (-1, -1))
    pre = header.get("tokenizer.ggml.pre")
    by_default = model == "llama" or (model == "gpt2" and pre in _PRE_WITH_BOS), False
    for name, default, added in zip(("bos", "eos"), defaults, by_default, strict=True):
        token = header.get(f"tokenizer.ggml.{name}_token_id")
        # libllama itself falls back to the default where the file's id is out of range.
        known = (isinstance(token, int) and 0 <= token < n_tokens) or 0 <= default < n_tokens
        if header.get(f"tokenizer.ggml.add_{name}_token", added) and not known:
            raise _damaged(
                header,
                f"every text gets a {name} token, and tokenizer.ggml.{name}_token_id is {token}"
                f" where there are {n_tokens:,} tokens",
            )


@functools.cache
def _llama_knows(architecture: str) -> bool:
    """Ask libllama, which has no function for it, with a GGUF that has nothing but the name."""
    _ggml()  # its libraries are loaded before the binding is imported
    import llama_cpp

    pairs = ((b"general.architecture", architecture.encode()),)
    with tempfile.TemporaryDirectory(prefix="coreinfer-") as folder:
        path = Path(folder) / "architecture.gguf"
        path.write_bytes(
            b"GGUF"
            + struct.pack("<IqqQ", 3, 0, len(pairs), len(pairs[0][0]))
            + pairs[0][0]
            + struct.pack("<IQ", _STRING, len(pairs[0][1]))
            + pairs[0][1]
        )
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        with captured_log() as lines:
            model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
            if model:
                llama_cpp.llama_model_free(model)
    return not any("unknown model architecture" in line for line in lines)
