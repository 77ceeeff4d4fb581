"""Reads and checks the header of a GGUF file, so that llama.cpp never aborts on one.

Some wrong counts, types or ranges in a file fail an assertion in ggml, which aborts the process. So
a file passes two checks before it is loaded:

1. ggml's own reader, which llama.cpp uses too, parses at most MAX_HEADER_BYTES. If it refuses the
   file, its log becomes our error.
2. ``loadable.check_loadable`` refuses metadata that is valid GGUF but fails an assertion in
   libllama.

File format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import re
import stat
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from coreinfer_edge.binding.gguf import GGUF, Scalar, parse, type_name
from coreinfer_edge.binding.gguf import GGUFArray as GGUFArray
from coreinfer_edge.errors import (
    CoreInferError,
    InsufficientMemoryError,
    ModelFileError,
)

MAX_HEADER_BYTES = 256 * 1024**2

# The fewest bytes of a tensor and of a key in the header: lengths, types and counts, no content.
_LEAST_BYTES = {"tensors": 24, "metadata keys": 14}

# The names of the tensors of a layer's FFN; ffn.py defines which FFNs are dense.
FFN_TENSOR = re.compile(r"blk\.(\d+)\.ffn_(up|gate|down)\.(weight|bias|scale)")


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of the file.

    Attributes:
        name: e.g. ``"blk.0.ffn_up.weight"``.
        type: ggml's name of the element type, e.g. ``"q4_K"``.
        ggml_type: ggml's number of that type.
        shape: elements per dimension in ggml's order, the contiguous dimension first, without
            ones at the end.
        file: the file with its data (a split GGUF has several).
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
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFHeader:
    """The header of a GGUF file: metadata and tensors, without their data.

    It can be used as the path of its file, so that a caller that has read it can pass it on.

    Attributes:
        path: the file (the first one of a split GGUF).
        files: all files, ``path`` first.
        file_size: bytes in all files.
        version: GGUF version, 2 or 3.
        architecture: ``general.architecture``, e.g. ``"llama"``.
        alignment: alignment of tensor data, in bytes.
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

    def __fspath__(self) -> str:
        return str(self.path)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key, or ``default`` without that key."""
        return self.metadata.get(key, default)

    def of_architecture(self, key: str) -> Scalar | GGUFArray | None:
        """The value of ``<architecture>.<key>``, e.g. of ``block_count``."""
        return self.metadata.get(f"{self.architecture}.{key}")

    @property
    def n_layers(self) -> int:
        """Number of layers, 0 if the file does not say."""
        count = self.of_architecture("block_count")
        return count if isinstance(count, int) else 0

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is the output too."""
        return "token_embd.weight" in self.tensors and "output.weight" not in self.tensors

    def without_arrays(self) -> GGUFHeader:
        """The header without arrays, whose memory in ggml (some MiB) is then freed."""
        rest = {k: v for k, v in self.metadata.items() if not isinstance(v, GGUFArray)}
        return replace(self, metadata=rest)

    @property
    def ffn_tensors(self) -> list[GGUFTensor]:
        """The tensors with names of FFN tensors, in the order of their names."""
        return [self.tensors[name] for name in sorted(self.tensors) if FFN_TENSOR.fullmatch(name)]


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read the header of a GGUF file, and of the other files if it is split.

    Args:
        path: a file on disk; of a split GGUF, the first file.

    Raises:
        ModelFileError: the file is missing, unreadable, not a GGUF, cut off or damaged.
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


def _read_part(path: Path) -> _Part:
    """Parse one file with ggml's reader, and check that all its tensors lie within the file."""
    size = _regular_file_size(path)
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            version = _checked_start(path, head)
            n_bytes = min(size, MAX_HEADER_BYTES)
            # Not closed by hand: an interrupt may have left a view of it in its traceback.
            data = mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ)
            gguf = parse(np.frombuffer(data, np.uint8))
    except OSError as error:
        raise _unreadable(path, error) from error
    if not isinstance(gguf, GGUF):
        raise _refusal(path, size, gguf)
    metadata: dict[str, Scalar | GGUFArray] = {}
    value_types: dict[str, str] = {}
    for key, kind, value in gguf.pairs():
        # C sees the first of two keys that differ after a zero byte
        metadata.setdefault(key, value)
        value_types.setdefault(key, kind)
    tensors = [
        GGUFTensor(
            name=info.name,
            type=type_name(info.ggml_type),
            ggml_type=info.ggml_type,
            shape=info.shape,
            file=path,
            offset=gguf.data_offset + info.offset,
            n_bytes=info.n_bytes,
        )
        for info in gguf.tensors()
    ]
    for tensor in tensors:
        if tensor.offset + tensor.n_bytes > size:
            needed = max(t.offset + t.n_bytes for t in tensors)
            raise ModelFileError(
                f"{path} is cut off: it has {size:,} bytes, and the tensors it lists need"
                f" {needed:,}, so {needed - size:,} are missing (from tensor {tensor.name} on):"
                " download it again"
            )
    return _Part(path, size, version, gguf.alignment, metadata, value_types, tensors)


def _checked_start(path: Path, head: bytes) -> int:
    """Check magic, version and counts; returns the version."""
    if not head.startswith(b"GGUF"[: len(head)]):
        raise ModelFileError(
            f"{path} is not a GGUF file{_seems_to_be(head)}: name a .gguf file, or download it"
            " again"
        )
    if len(head) < 24:
        raise ModelFileError(
            f"{path} is cut off: it has {len(head)} bytes, and needs at least 24: download it again"
        )
    version, *counts = struct.unpack_from("<Iqq", head, 4)
    if version & 0xFFFF == 0:
        raise ModelFileError(
            f"{path} is a GGUF for big-endian machines, and this one is {sys.byteorder}-endian:"
            " get or convert the model for this machine"
        )
    if version not in (2, 3):
        raise ModelFileError(
            f"{path} is GGUF version {version}; versions 2 and 3 can be read: "
            + ("convert the model again" if version < 2 else "update coreinfer-edge")
        )
    for (what, least), n in zip(_LEAST_BYTES.items(), counts, strict=True):
        if n < 0 or n * least > MAX_HEADER_BYTES:
            raise ModelFileError(f"{path} is damaged: it claims {n:,} {what}: download it again")
    return int(version)


# As 0008-gguf-says-where.patch has them.
_TOO_SHORT = re.compile(r"(\d+) bytes are needed at byte (\d+), ")
_PLACE = re.compile(r"failed to read (.*)")


def _refusal(path: Path, size: int, lines: list[str]) -> ModelFileError:
    """The log of ggml's reader about a file that it refused, as an error."""
    short = next(filter(None, map(_TOO_SHORT.match, lines)), None)
    if short is None:
        reason = "; ".join(lines) or "ggml cannot read its header"
        return ModelFileError(f"{path} is damaged: {reason}: download or convert it again")
    place = next((match[1] for line in lines if (match := _PLACE.match(line))), "its header")
    end = int(short[1]) + int(short[2])
    if end > MAX_HEADER_BYTES:
        return ModelFileError(
            f"{path} is damaged: at byte {int(short[2]):,}, {place} claims {end:,} bytes of header,"
            f" and {MAX_HEADER_BYTES:,} are allowed: download it again"
        )
    return ModelFileError(
        f"{path} is cut off: it has {size:,} bytes and ends within {place}, where at least"
        f" {end - size:,} more are needed: download it again"
    )


_SPLIT_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def _read_other_parts(path: Path, first: _Part) -> Iterator[_Part]:
    """Read the other files of a split GGUF; llama.cpp loads them by their names."""
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


def _seems_to_be(start: bytes) -> str:
    """Recognise a file that is often mistaken for a GGUF."""
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
