"""Reads and checks the header of a GGUF file, so that llama.cpp never sees one it would die of.

llama.cpp trusts a file in places: a wrong count, type or range there ends the process (an assertion
in ggml) instead of an error. So a file passes three gates before it is loaded:

1. ``_scan`` walks the header in Python, with limits, and knows where in the file it is. It finds
   what is cut off, absurd, or not a GGUF at all.
2. ggml's own reader, the one llama.cpp uses, has the last word on what a valid GGUF is.
3. ``loadable.check_loadable`` refuses metadata that is valid GGUF but that libllama asserts on.

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from coreinfer_edge.binding import load as native
from coreinfer_edge.binding.log import captured_log
from coreinfer_edge.errors import (
    CoreInferError,
    InsufficientMemoryError,
    ModelFileError,
)

MAX_HEADER_BYTES = 256 * 1024**2
MAX_ARRAY_STRINGS = 4 * 1024**2
MAX_ARRAY_ELEMENTS = 1024**3

CHAT_TEMPLATE = "tokenizer.chat_template"

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
GGUF_STRING, _ARRAY = 8, 9

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
        ggml_type: its number.
        shape: elements per dimension in ggml's order, the contiguous one first.
        file: the file it lies in (a split GGUF has several).
        offset: bytes from the start of that file.
        n_bytes: size of the data.
    """

    name: str
    type: str
    ggml_type: int
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
            type=type_traits(info.type).name,
            ggml_type=info.type,
            shape=info.shape,
            file=path,
            offset=data_start + info.offset,
            n_bytes=type_traits(info.type).n_bytes(info.shape),
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
        if kind == GGUF_STRING:
            return self.text()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise self.damaged(f"the unknown value type {kind}")
            value: Scalar = self.number(_SCALARS[kind][1])
            return value
        kind = self.number("<I")
        length = self.number("<Q")
        start = self.pos
        if kind == GGUF_STRING:
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
    return "str" if kind == GGUF_STRING else _SCALARS[kind][0]


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


class TypeTraits(NamedTuple):
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
def type_traits(number: int) -> TypeTraits:
    """Traits of a type number that ggml's reader has let through (it asserts on others)."""
    lib = _ggml()
    return TypeTraits(
        lib.ggml_type_name(number).decode(),
        lib.ggml_blck_size(number),
        lib.ggml_type_size(number),
    )


def _ask_ggml(path: Path) -> None:
    """Raise unless ggml's own reader accepts the header."""
    lib = _ggml()
    with captured_log() as lines:
        context = lib.gguf_init_from_file(native.file_name(path), _InitParams(True, None))
        if context:
            lib.gguf_free(context)
    if not context:
        reasons = [line.split(": ", 1)[-1].strip() for line in lines]
        raise ModelFileError(
            f"{path} is damaged: {'; '.join(reasons) or 'ggml cannot read its header'}:"
            " download or convert it again"
        )
