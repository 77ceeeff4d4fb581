"""Other engines to compare with, each in a process that does not import coreinfer_edge."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import psutil

from coreinfer_edge.errors import ArgumentError, CoreInferError
from coreinfer_edge.measure import engines as bench_engines
from coreinfer_edge.measure.engines import Answer

PIP = {
    "llama.cpp": "pip install llama-cpp-python",
    "transformers": "pip install torch transformers gguf",
    "onnxruntime-genai": "pip install onnxruntime-genai",
    "openvino-genai": "pip install openvino-genai",
}
_TAKES_FOLDER = ("onnxruntime-genai", "openvino-genai")

# run_path, and no folder of the caller's: modules of ours have names of the standard library's.
_START = (
    "import runpy, sys; sys.path[:] = filter(None, sys.path);"
    " runpy.run_path(sys.argv[1], run_name='__main__')"
)


class BaselineError(CoreInferError):
    """Another engine could not be measured; the others go on without it."""


class Baseline:
    """One engine in another process. As ``bench_engines.Engine``, and a context manager.

    Args:
        name: ``"llama.cpp"``, ``"transformers float32"``, ``"transformers bfloat16"``,
            ``"onnxruntime-genai"`` or ``"openvino-genai"``.
        path: the GGUF file, or the folder of a model in the engine's own form.
        n_ctx: most tokens of a prompt and its answer.
        threads: CPU threads, None for the engine's own choice.
        processor_time: measure that instead of the time that passes.

    Raises:
        BaselineError: it is not installed, or cannot load the model.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        n_ctx: int,
        threads: int | None,
        processor_time: bool = False,
    ) -> None:
        self.name = name
        self.peak_memory = 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, bench_engines.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            self._call(
                "load",
                engine=name,
                path=str(path),
                n_ctx=n_ctx,
                threads=threads,
                processor_time=processor_time,
            )
        except BaseException:
            self.close()
            raise

    def answer(self, prompt: Sequence[int], n: int) -> Answer:
        return cast(Answer, self._call("answer", prompt=list(prompt), n=n))

    def fill(self, tokens: Sequence[int]) -> None:
        self._call("fill", tokens=list(tokens))

    def burst(self, n: int) -> float:
        return float(self._call("burst", n=n))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Baseline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, what: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": what, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            raise BaselineError(f"its process ended with status {status}: memory may have run out")
        reply = json.loads(line)
        if "missing" in reply:
            raise BaselineError(f"{reply['missing']}: {PIP[self.name.split()[0]]}")
        if "error" in reply:
            raise BaselineError(reply["error"])
        self.peak_memory = reply["peak_memory"]
        return reply["result"]


def wanted_baselines(names: Sequence[str], model: Path) -> dict[str, Path]:
    """The engines that ``--vs`` names, with the model that each is to load.

    Args:
        names: of ``PIP``; those that cannot read a GGUF as ``NAME=FOLDER``.
        model: the GGUF file.

    Raises:
        ArgumentError: an engine that is not known, or one without its folder.
    """
    wanted: dict[str, Path] = {}
    for text in names:
        name, _, folder = text.partition("=")
        if name not in PIP:
            raise ArgumentError(f"--vs {name}: it must be one of {', '.join(PIP)}")
        if (name in _TAKES_FOLDER) != bool(folder):
            raise ArgumentError(
                f"--vs {name}: give the folder of the model in its own form, --vs {name}=FOLDER"
                if name in _TAKES_FOLDER
                else f"--vs {name} reads the GGUF file: leave ={folder} out"
            )
        if folder and not Path(folder).is_dir():
            raise ArgumentError(f"--vs {name}: {folder} is no folder")
        if name == "transformers":
            wanted |= dict.fromkeys((f"{name} float32", f"{name} bfloat16"), model)
        else:
            wanted[name] = Path(folder) if folder else model
    return wanted


def check_fits(name: str, n_parameters: int) -> None:
    """Refuse what would have the system end processes: torch holds all weights dequantised.

    Raises:
        BaselineError: the weights would take more than the memory available.
    """
    if not name.startswith("transformers "):
        return
    # dequantised to float32 first, and then in the type wanted
    needed = n_parameters * (8 if name.endswith("float32") else 6)
    available = psutil.virtual_memory().available
    if needed > available:
        raise BaselineError(
            f"the weights dequantised need {needed / 2**30:.1f} GiB to load, and"
            f" {available / 2**30:.1f} GiB are available"
        )
