"""Writes a GGUF with the prior among its metadata; the tensors stay byte for byte as they are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from coreinfer_edge.errors import ArgumentError, ModelFileError
from coreinfer_edge.gguf_header import GGUFHeader
from coreinfer_edge.prior import Prior, fingerprint, to_metadata

_ARRAY_TYPES = {
    "i": gguf.GGUFValueType.INT32,
    "f": gguf.GGUFValueType.FLOAT32,
}


def check_output(header: GGUFHeader, output: Path, overwrite: bool) -> None:
    """Raise before the work begins what ``write_with_prior`` would raise after it.

    Raises:
        ArgumentError: the output exists, is the input, or its folder does not exist.
    """
    if len(header.files) > 1:
        raise ArgumentError(
            f"{header.path} is split into {len(header.files)} files: merge them first"
            " (llama-gguf-split --merge)"
        )
    if not output.parent.is_dir():
        raise ArgumentError(f"{output.parent} is no folder: make it, or name another output")
    if output.exists():
        if output.samefile(header.path):
            raise ArgumentError(f"{output} is the model itself: name another output")
        if output.is_dir() or not overwrite:
            raise ArgumentError(f"{output} exists: name another output, or allow --overwrite")


def write_with_prior(
    header: GGUFHeader,
    prior: Prior,
    output: Path,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """Write the model again, with the prior in place of one that it may have.

    Args:
        header: of the model.
        prior: its statistics.
        output: the new file; it appears when it is complete.
        overwrite: whether a file of that name may be replaced.
        advance: called with the number of bytes of tensors written since the last call.

    Raises:
        ArgumentError: the output cannot be written there.
        ModelFileError: the model cannot be read, or the output not be written.
    """
    check_output(header, output, overwrite)
    handle, temporary = tempfile.mkstemp(prefix=f".{output.name}-", dir=output.parent)
    os.close(handle)
    try:
        _write(header, prior, Path(temporary), advance)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, output)
    except OSError as error:
        raise ModelFileError(f"{output} cannot be written: {error.strerror or error}") from error
    except ValueError as error:  # metadata that the writer of gguf does not take
        raise ModelFileError(f"{header.path} cannot be written again: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write(header: GGUFHeader, prior: Prior, path: Path, advance: Callable[[int], None]) -> None:
    reader = gguf.GGUFReader(header.path)
    writer = gguf.GGUFWriter(path, header.architecture, endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    for field in reader.fields.values():
        # the writer makes the architecture and the counts itself
        if field.name.startswith(("GGUF.", "coreinfer.")) or field.name == "general.architecture":
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    for key, value in to_metadata(prior, fingerprint(header)).items():
        if isinstance(value, np.ndarray):
            kind = _ARRAY_TYPES[value.dtype.kind]
            writer.add_key_value(key, value.tolist(), gguf.GGUFValueType.ARRAY, sub_type=kind)
        elif isinstance(value, list):
            kind = gguf.GGUFValueType.STRING
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=kind)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for tensor in reader.tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.data.shape,
            tensor.data.dtype,
            tensor.data.nbytes,
            tensor.tensor_type,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(tensor.data)
        advance(int(tensor.n_bytes))
    writer.close()
