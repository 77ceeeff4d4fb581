"""Makes a GGUF with statistics of its neurons, from a Hugging Face model or a GGUF.

The tensors of a GGUF stay byte for byte as they are; the prior is added to its metadata.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from coreinfer_edge.calibrate.hugging_face import (
    ProgressBar,
    check_folder,
    estimated_bytes,
    make_gguf,
    n_neurons_of,
    no_progress,
)
from coreinfer_edge.calibrate.native import WINDOW, calibrate
from coreinfer_edge.calibrate.text import generate_calibration, other_text
from coreinfer_edge.choose.prior import Prior, fingerprint, to_metadata
from coreinfer_edge.errors import ArgumentError, ModelFileError
from coreinfer_edge.model.ffn import dense_ffn
from coreinfer_edge.model.header import GGUFHeader, read_header
from coreinfer_edge.run.llm import EdgeLLM

BACK_ENDS = ("auto", "torch", "native")
CALIBRATION_TOKENS = 32768
GENERATED_TOKENS = 8192

_ARRAY_TYPES = {
    "i": gguf.GGUFValueType.INT32,
    "f": gguf.GGUFValueType.FLOAT32,
}


@dataclass(frozen=True)
class Conversion:
    """The arguments of ``convert``.

    Attributes:
        source: a GGUF file, or the folder of a Hugging Face model.
        output: the new GGUF file.
        type: the type that a Hugging Face model is quantised to, one of ``hugging_face.TYPES``.
        calibration: the text to calibrate on; None for text that the model itself generates.
        n_tokens: about how many tokens of it; None for CALIBRATION_TOKENS of a given text, or
            GENERATED_TOKENS of a generated one.
        n_clusters: groups of texts for the strategy ``similarity``.
        seed: the seed of generating, grouping and sampling.
        back_end: the collector of the statistics: ``"torch"`` (Hugging Face models only, with
            gradients), ``"native"``, or ``"auto"`` for torch if the source is a Hugging Face model.
        overwrite: whether the output may be replaced.
        n_threads: CPU threads; None for llama-cpp-python's default.
        n_gpu_layers: layers to put on a GPU.
        verbose: show the log of llama.cpp.
    """

    source: Path
    output: Path
    type: str = "q4_k_m"
    calibration: str | None = None
    n_tokens: int | None = None
    n_clusters: int = 8
    seed: int = 0
    back_end: str = "auto"
    overwrite: bool = False
    n_threads: int | None = None
    n_gpu_layers: int = 0
    verbose: bool = False

    @property
    def from_folder(self) -> bool:
        """Whether the source is a Hugging Face model."""
        return self.source.is_dir()

    @property
    def with_torch(self) -> bool:
        """Whether torch collects the statistics."""
        return self.from_folder and self.back_end != "native"

    @property
    def tokens(self) -> int:
        """Tokens to calibrate on."""
        default = GENERATED_TOKENS if self.calibration is None else CALIBRATION_TOKENS
        return self.n_tokens or default


class Expected(NamedTuple):
    """The expected size of the output.

    Attributes:
        tensor_bytes: exact for a GGUF, an estimate for a Hugging Face model.
        statistics_bytes: size of the ``coreinfer.*`` metadata.
        header: the header of the source; None for a Hugging Face model.
    """

    tensor_bytes: int
    statistics_bytes: int
    header: GGUFHeader | None


def check(conversion: Conversion) -> Expected:
    """Estimate the size, and raise the errors of ``convert`` that can be known before the work.

    Raises:
        As ``convert``.
    """
    header = None
    if conversion.back_end not in BACK_ENDS:
        raise ArgumentError(
            f"the back end is {conversion.back_end!r}: it must be one of {', '.join(BACK_ENDS)}"
        )
    if conversion.from_folder:
        check_folder(conversion.source, conversion.type)
        _check_free(conversion.source, conversion.output, conversion.overwrite)
        n_bytes = estimated_bytes(conversion.source, conversion.type)
        n_neurons = n_neurons_of(conversion.source)
    else:
        if conversion.back_end == "torch":
            raise ArgumentError(
                f"{conversion.source} is not the folder of a Hugging Face model, which the torch"
                " back end needs: use the native one"
            )
        header = read_header(conversion.source)
        check_output(header, conversion.output, conversion.overwrite)
        n_bytes = sum(tensor.n_bytes for tensor in header.tensors.values())
        n_neurons = sum(layer.width for layer in dense_ffn(header).values())
    per_neuron = 2 * (5 if conversion.with_torch else 4) + conversion.n_clusters
    return Expected(n_bytes, n_neurons * per_neuron * 4 // 3, header)


def convert(conversion: Conversion, progress: ProgressBar = no_progress) -> Prior:
    """Make a GGUF that carries the statistics of its neurons.

    An error or an interrupt leaves no file behind.

    Args:
        conversion: the arguments.
        progress: opens a progress bar, given a label and a total.

    Returns:
        The statistics.

    Raises:
        ArgumentError: the output cannot be written there, or the text is too short.
        ModelFileError: the model cannot be read or converted, or the output cannot be written.
        UnsupportedModelError: llama.cpp does not know the model, or it has no dense FFN.
        MissingPackageError: torch, transformers or accelerate is needed and not installed.
    """
    header = check(conversion).header
    # Beside the output, where there is room for it.
    with tempfile.TemporaryDirectory(
        prefix=f".{conversion.output.name}-", dir=conversion.output.parent
    ) as folder:
        if header is None:
            path = Path(folder) / "model.gguf"
            make_gguf(conversion.source, path, conversion.type, conversion.n_threads, progress)
            header = read_header(path)
        prior = calibrated(conversion, header, progress)
        n_bytes = sum(tensor.n_bytes for tensor in header.tensors.values())
        with progress("writing, bytes", n_bytes) as advance:
            write_with_prior(header, prior, conversion.output, conversion.overwrite, advance)
    return prior


def calibrated(
    conversion: Conversion, header: GGUFHeader, progress: ProgressBar = no_progress
) -> Prior:
    """Collect the statistics of a GGUF file, and write nothing.

    Args:
        conversion: the arguments. If its source is a Hugging Face model, the file must be made
            from that model.
        header: the header of the file.
        progress: opens a progress bar, given a label and a total.

    Raises:
        As ``convert``.
    """
    threads: dict[str, Any] = {}
    if conversion.n_threads is not None:
        threads = {"n_threads": conversion.n_threads, "n_threads_batch": conversion.n_threads}
    with EdgeLLM(
        header,
        strategy="dense",
        n_ctx=WINDOW,
        n_gpu_layers=conversion.n_gpu_layers,
        verbose=conversion.verbose,
        **threads,
    ) as llm:
        n_tokens = conversion.tokens
        if conversion.calibration is None:
            with progress("generating, tokens", n_tokens) as advance:
                texts = generate_calibration(llm, n_tokens, conversion.seed, advance)
        else:
            text = conversion.calibration.encode()
            texts = [llm.llama.tokenize(text, add_bos=False, special=False)]
        other = llm.llama.tokenize(other_text().encode(), add_bos=False, special=False)
        with progress("calibrating, tokens", n_tokens) as advance:
            return calibrate(
                llm,
                header,
                texts,
                n_tokens,
                conversion.n_clusters,
                conversion.seed,
                advance,
                conversion.source if conversion.with_torch else None,
                other,
            )


def check_output(header: GGUFHeader, output: Path, overwrite: bool) -> None:
    """Raise the errors of ``write_with_prior`` that can be known before the work.

    Raises:
        ArgumentError: the output exists, is the input, or its folder does not exist.
    """
    if len(header.files) > 1:
        raise ArgumentError(
            f"{header.path} is split into {len(header.files)} files: merge them first"
            " (llama-gguf-split --merge)"
        )
    _check_free(header.path, output, overwrite)


def _check_free(source: Path, output: Path, overwrite: bool) -> None:
    if not output.parent.is_dir():
        raise ArgumentError(f"{output.parent} is not a folder: make it, or name another output")
    if output.exists():
        if output.samefile(source):
            raise ArgumentError(f"{output} is the model itself: name another output")
        if output.is_dir():
            raise ArgumentError(f"{output} is a folder: name a file")
        if not overwrite:
            raise ArgumentError(f"{output} exists: name another output, or allow --overwrite")


def write_with_prior(
    header: GGUFHeader,
    prior: Prior,
    output: Path,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """Write the model again, with this prior instead of any other.

    Args:
        header: the header of the model.
        prior: its statistics.
        output: the new file; it appears once it is complete.
        overwrite: whether a file of that name may be replaced.
        advance: called with the number of bytes of tensors written since the last call.

    Raises:
        ArgumentError: the output cannot be written there.
        ModelFileError: the model cannot be read, or the output cannot be written.
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
