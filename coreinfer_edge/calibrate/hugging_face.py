"""Makes a GGUF of a Hugging Face model: llama.cpp's own converter, then libllama's quantiser."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from coreinfer_edge.binding import load as native
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.binding.log import captured_log
from coreinfer_edge.calibrate.torch_model import import_torch, weight_files
from coreinfer_edge.errors import ArgumentError, ModelFileError, UnsupportedModelError
from coreinfer_edge.run.processors import allowed_processors

CONVERTER = native.BINDING_DIR.parent / "convert" / "convert_hf_to_gguf.py"

ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def no_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar that shows nothing."""
    yield lambda n: None


# The types that the converter writes itself; the others are quantised from 16 bits.
_CONVERTED = ("f32", "f16", "bf16", "q8_0")

# Bits per weight, as llama-quantize reports them for a Llama of 8 billion weights.
_BITS = {
    "f32": 32.0,
    "f16": 16.0,
    "bf16": 16.0,
    "auto": 16.0,
    "q8_0": 8.5,
    "q6_k": 6.56,
    "q5_k_m": 5.7,
    "q5_k_s": 5.57,
    "q5_1": 6.0,
    "q5_0": 5.5,
    "q4_k_m": 4.89,
    "q4_k_s": 4.67,
    "q4_1": 5.0,
    "q4_0": 4.5,
    "iq4_nl": 4.68,
    "iq4_xs": 4.46,
    "q3_k_l": 4.3,
    "q3_k_m": 4.0,
    "q3_k_s": 3.64,
    "q2_k": 3.16,
}
TYPES = tuple(type for type in _BITS if type != "auto")


def check_folder(folder: Path, type: str) -> None:
    """Check a folder before the work begins.

    Raises:
        ArgumentError: the type is not known.
        ModelFileError: the folder holds no Hugging Face model.
        MissingPackageError: torch, transformers or accelerate is not installed.
    """
    if type not in TYPES:
        raise ArgumentError(f"type is {type!r}: it must be one of {', '.join(TYPES)}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(
            f"{folder} is not a Hugging Face model: it has no readable config.json"
        ) from error
    if not isinstance(config, dict) or not config.get("architectures"):
        raise ModelFileError(f"{folder}/config.json names no architectures: download it again")
    if not weight_files(folder):
        raise ModelFileError(
            f"{folder} has no weights (*.safetensors or pytorch_model*.bin): download it again"
        )
    import_torch("converting a Hugging Face model")


def estimated_bytes(folder: Path, type: str) -> int:
    """About how large the GGUF will be, from the size and the type of the checkpoint."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float16")
    n_bytes = sum(path.stat().st_size for path in weight_files(folder))
    return int(n_bytes * _BITS[type] / (32 if dtype == "float32" else 16))


def n_neurons_of(folder: Path) -> int:
    """The number of FFN neurons in all layers, from the configuration; 0 if it does not say."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {**config, **(config.get("text_config") or {})}

    def first(*names: str) -> int:
        return next((config[name] for name in names if isinstance(config.get(name), int)), 0)

    n_ff = first("intermediate_size", "ffn_dim", "n_inner") or 4 * first("hidden_size", "n_embd")
    return n_ff * first("num_hidden_layers", "n_layer")


def make_gguf(
    folder: Path,
    output: Path,
    type: str,
    n_threads: int | None = None,
    progress: ProgressBar = no_progress,
) -> None:
    """Convert and quantise a Hugging Face model.

    Args:
        folder: the model.
        output: the GGUF to write, in a folder of temporary files that the caller removes.
        type: one of TYPES.
        n_threads: for quantising; None for all cores.
        progress: opens a bar, given a label and the number of bytes.

    Raises:
        ModelFileError: the converter failed; its last line is the reason.
        UnsupportedModelError: it, or llama.cpp, does not know the model.
    """
    direct = type in _CONVERTED
    converted = output if direct else output.with_name("converted.gguf")
    made = type if direct else "auto"
    with progress("converting, bytes", estimated_bytes(folder, made)) as advance:
        _convert(folder, converted, made, _grown(converted, advance))
    if not direct:
        with progress("quantising, bytes", estimated_bytes(folder, type)) as advance:
            _quantize(converted, output, type, n_threads, _grown(output, advance))
        converted.unlink()


def _grown(path: Path, advance: Callable[[int], None]) -> Callable[[], None]:
    """A function that reports the growth of a file to a progress bar."""
    seen = 0

    def look() -> None:
        nonlocal seen
        if (now := _size(path)) > seen:
            advance(now - seen)
            seen = now

    return look


def _convert(folder: Path, output: Path, type: str, look: Callable[[], None]) -> None:
    command = [sys.executable, str(CONVERTER), str(folder.resolve()), "--outtype", type]
    command += ["--outfile", str(output)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                look()
        finally:
            if process.poll() is None:  # interrupted
                process.kill()
                process.wait()
        log.seek(0)
        lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines()]
    if process.returncode == 0 and output.is_file():
        return
    last = next((line for line in reversed(lines) if line), f"status {process.returncode}")
    message = f"llama.cpp's converter cannot convert {folder}: {last[-300:]}"
    if "is not supported" in last or "NotImplementedError" in last:
        raise UnsupportedModelError(message)
    raise ModelFileError(message)


def _quantize(
    source: Path,
    output: Path,
    type: str,
    n_threads: int | None,
    look: Callable[[], None],
) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = _file_type(type)
    params.nthread = n_threads or allowed_processors()
    status: list[int] = []

    def run() -> None:
        status.append(
            llama_cpp.llama_model_quantize(
                native.file_name(source), native.file_name(output), params
            )
        )

    # In a thread, so that Ctrl-C takes effect. The thread goes on writing a temporary file then.
    with captured_log() as log:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            look()
    if status != [0]:
        reason = " ".join("".join(log).split())[-300:] or "libllama gives no reason"
        raise UnsupportedModelError(f"{source.name} cannot be quantised to {type}: {reason}")


def _file_type(type: str) -> int:
    """The number of a type in ``enum llama_ftype``."""
    name = {"f32": "ALL_F32"}.get(type, f"MOSTLY_{type.upper()}")
    return int(getattr(llama_cpp, f"LLAMA_FTYPE_{name}"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
