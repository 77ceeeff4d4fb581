"""ggml's reader of GGUF headers, the one that llama.cpp uses: keys, arrays, tensors."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Iterator
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from coreinfer_edge.binding.load import load_library
from coreinfer_edge.binding.log import captured_log

Scalar = int | float | bool | str


class _InitParams(ctypes.Structure):
    """``struct gguf_init_params`` of gguf.h."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@functools.cache
def _ggml() -> ctypes.CDLL:
    """ggml-base, with the functions used here declared."""
    lib = load_library("ggml-base")
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    number, i64 = ctypes.c_int, ctypes.c_int64
    for name, result, *arguments in (
        ("gguf_init_from_buffer", pointer, pointer, size, _InitParams),
        ("gguf_free", None, pointer),
        ("gguf_type_name", text, number),
        ("gguf_get_alignment", size, pointer),
        ("gguf_get_data_offset", size, pointer),
        ("gguf_get_n_kv", i64, pointer),
        ("gguf_get_key", text, pointer, i64),
        ("gguf_get_kv_type", number, pointer, i64),
        ("gguf_get_arr_type", number, pointer, i64),
        ("gguf_get_val_str", text, pointer, i64),
        ("gguf_get_val_data", pointer, pointer, i64),
        ("gguf_get_arr_n", size, pointer, i64),
        ("gguf_get_arr_data", pointer, pointer, i64),
        ("gguf_get_arr_str", text, pointer, i64, size),
        ("gguf_get_n_tensors", i64, pointer),
        ("gguf_get_tensor_name", text, pointer, i64),
        ("gguf_get_tensor_type", number, pointer, i64),
        ("gguf_get_tensor_ne", ctypes.POINTER(i64 * 4), pointer, i64),
        ("gguf_get_tensor_offset", size, pointer, i64),
        ("gguf_get_tensor_size", size, pointer, i64),
        ("ggml_type_name", text, number),
        ("ggml_blck_size", i64, number),
        ("ggml_type_size", size, number),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class TensorInfo(NamedTuple):
    """A tensor as ``GGUFTensor`` has it, with the offset from where the data begins."""

    name: str
    ggml_type: int
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class GGUFArray(NamedTuple):
    """An array among the metadata. It stays in ggml's memory until ``read`` copies its values."""

    type: str
    length: int
    file: GGUF
    key: int

    def read(self) -> npt.NDArray[Any] | list[bytes]:
        """The values: a numpy array of numbers, or a list of byte strings.

        As in C, a string ends at its first zero byte.
        """
        pointer, lib = self.file.pointer, _ggml()
        if self.type == "str":
            ids = range(self.length)
            return list(map(lib.gguf_get_arr_str, repeat(pointer), repeat(self.key), ids))
        dtype = _dtype(self.type)
        data = lib.gguf_get_arr_data(pointer, self.key) if self.length else None
        return np.frombuffer(ctypes.string_at(data or 0, self.length * dtype.itemsize), dtype)


def parse(data: npt.NDArray[np.uint8]) -> GGUF | list[str]:
    """Parse a header; where ggml refuses it, the lines of its log.

    Args:
        data: the file, or as much of it as the header may take. Not needed afterwards.
    """
    with captured_log() as lines:
        pointer = _ggml().gguf_init_from_buffer(
            data.ctypes.data, len(data), _InitParams(True, None)
        )
    if pointer:
        return GGUF(pointer)
    return [" ".join(line.split(": ", 1)[-1].split()) for line in lines]


class GGUF:
    """A parsed header. It is freed with the last of its arrays."""

    def __init__(self, pointer: int) -> None:
        lib = _ggml()
        self.pointer = ctypes.c_void_p(pointer)
        weakref.finalize(self, lib.gguf_free, self.pointer)
        self.alignment = int(lib.gguf_get_alignment(self.pointer))
        self.data_offset = int(lib.gguf_get_data_offset(self.pointer))

    def pairs(self) -> Iterator[tuple[str, str, Scalar | GGUFArray]]:
        """Each key, the name of its type (``"u32"``, ``"str"``, ``"arr"``), and its value."""
        lib = _ggml()
        for i in range(lib.gguf_get_n_kv(self.pointer)):
            name = lib.gguf_get_key(self.pointer, i).decode("utf-8", "replace")
            kind = lib.gguf_type_name(lib.gguf_get_kv_type(self.pointer, i)).decode()
            value: Scalar | GGUFArray
            if kind == "arr":
                of = lib.gguf_type_name(lib.gguf_get_arr_type(self.pointer, i)).decode()
                value = GGUFArray(of, int(lib.gguf_get_arr_n(self.pointer, i)), self, i)
            elif kind == "str":
                value = lib.gguf_get_val_str(self.pointer, i).decode("utf-8", "replace")
            else:
                dtype = _dtype(kind)
                data = ctypes.string_at(lib.gguf_get_val_data(self.pointer, i), dtype.itemsize)
                value = np.frombuffer(data, dtype).item()
            yield name, kind, value

    def tensors(self) -> Iterator[TensorInfo]:
        """The tensors in the order of the file."""
        lib = _ggml()
        for i in range(lib.gguf_get_n_tensors(self.pointer)):
            shape = list(lib.gguf_get_tensor_ne(self.pointer, i).contents)
            while len(shape) > 1 and shape[-1] == 1:  # ggml keeps no number of dimensions
                shape.pop()
            yield TensorInfo(
                lib.gguf_get_tensor_name(self.pointer, i).decode("utf-8", "replace"),
                lib.gguf_get_tensor_type(self.pointer, i),
                tuple(shape),
                lib.gguf_get_tensor_offset(self.pointer, i),
                lib.gguf_get_tensor_size(self.pointer, i),
            )


def _dtype(kind: str) -> np.dtype[Any]:
    """Of numbers: ``u8`` to ``f64``, and ``bool``."""
    return np.dtype("?" if kind == "bool" else f"{kind[0]}{int(kind[1:]) // 8}")


def supports_architecture(name: str) -> bool:
    """Whether llama.cpp has a model for this ``general.architecture``."""
    function = load_library("llama").llama_supports_arch
    function.restype, function.argtypes = ctypes.c_bool, [ctypes.c_char_p]
    return bool(function(name.encode()))


@functools.cache
def type_name(ggml_type: int) -> str:
    """ggml's name of the type of a tensor, e.g. ``"q4_K"``."""
    return str(_ggml().ggml_type_name(ggml_type).decode())


def bytes_of(ggml_type: int, n_elements: int) -> int:
    """Bytes that whole blocks of a tensor's type take."""
    lib = _ggml()
    return int(n_elements // lib.ggml_blck_size(ggml_type) * lib.ggml_type_size(ggml_type))
