"""Other engines to compare with, each in a process that does not import coreinfer_edge."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil

from coreinfer_edge.errors import ArgumentError, CoreInferError
from coreinfer_edge.measure import engines as bench_engines
from coreinfer_edge.measure.engines import Answer
from coreinfer_edge.run.process_memory import peak_memory

PIP = {
    "llama.cpp": "llama-cpp-python",
    "transformers": "torch transformers gguf",
}
# llama.cpp copies weights into layouts for its kernels ("repack"), which can be slower. So both.
VARIANTS = {
    "llama.cpp": ("llama.cpp", "llama.cpp as stored"),
    "transformers": ("transformers float32", "transformers bfloat16"),
}

# run_path, so that neither this folder nor the caller's is on sys.path and hides other modules.
_START = (
    "import runpy, sys; sys.path[:] = filter(None, sys.path);"
    " runpy.run_path(sys.argv[1], run_name='__main__')"
)


class BaselineError(CoreInferError):
    """Another engine could not be measured; the others go on without it."""


@dataclass(frozen=True)
class Wanted:
    """One engine to compare with.

    Attributes:
        engine: one of those in VARIANTS.
        model: the GGUF file.
        options: further arguments of the engine, by name.
        python: the interpreter of the environment with the engine.
    """

    engine: str
    model: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable


class Baseline:
    """One engine in another process: a ``bench_engines.Engine`` and a context manager.

    Args:
        wanted: the engine and its model.
        n_ctx: the most tokens of a prompt and its answer.
        threads: CPU threads, None for the engine's own choice.
        processor_time: measure the processor's time instead of the time that passes.

    Raises:
        BaselineError: it is not installed, or cannot load the model.
    """

    def __init__(
        self, wanted: Wanted, n_ctx: int, threads: int | None, processor_time: bool = False
    ) -> None:
        self._wanted = wanted
        self._process = subprocess.Popen(
            [wanted.python, "-c", _START, bench_engines.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            self._call(
                "load",
                engine=wanted.engine,
                path=str(wanted.model),
                n_ctx=n_ctx,
                threads=threads,
                processor_time=processor_time,
                options=wanted.options,
            )
        except BaseException:
            self.close()
            raise

    @property
    def peak_memory(self) -> int:
        """Highest resident memory of its process so far, in bytes; 0 once that has ended."""
        return peak_memory(self._process.pid)

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

    def __exit__(self, *exception: object) -> None:
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
            package = PIP[self._wanted.engine.split()[0]]
            raise BaselineError(
                f"{reply['missing']}: {Path(self._wanted.python).name} -m pip install {package}"
            )
        if "error" in reply:
            raise BaselineError(reply["error"])
        return reply["result"]


def wanted_baselines(
    names: Sequence[str], model: Path, python: str | None = None
) -> dict[str, Wanted]:
    """The engines that ``--vs`` names, by their labels in the report.

    Args:
        names: ``NAME``, which options of the engine may follow: ``,KEY=VALUE``.
        model: the GGUF file.
        python: the interpreter of the environment with the engines, None for this one.

    Raises:
        ArgumentError: the engine is unknown, an option is not KEY=VALUE, or Python is missing.
    """
    python = python or sys.executable
    if shutil.which(python) is None:
        raise ArgumentError(f"--vs-python {python} is not a program")
    wanted: dict[str, Wanted] = {}
    for text in names:
        name, *given = text.split(",")
        if name not in VARIANTS:
            raise ArgumentError(f"--vs {name}: it must be one of {', '.join(VARIANTS)}")
        if wrong := [option for option in given if "=" not in option]:
            raise ArgumentError(f"--vs {name}: {wrong[0]!r} is not an option: give KEY=VALUE")
        options = {key: _value(value) for key, value in (text.split("=", 1) for text in given)}
        for engine in VARIANTS[name]:
            wanted[" ".join([engine, *given])] = Wanted(engine, model, options, python)
    return wanted


def _value(text: str) -> Any:
    """The value of JSON text; other text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_fits(name: str, n_parameters: int) -> None:
    """Refuse a model that would use up the memory: torch holds all weights dequantised.

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
