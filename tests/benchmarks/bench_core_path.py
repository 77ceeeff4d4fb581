"""Each step of the core path by itself: ``make bench``, ``make bench-compare``.

They run on one model with random weights, open in each type of its weights.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_random_gguf import make_random_gguf

from coreinfer_edge.binding.core import CoreContext
from coreinfer_edge.choose.chooser import Chooser
from coreinfer_edge.choose.statistics import CoreSet
from coreinfer_edge.run.llm import EdgeLLM

# The sizes of a Llama of 1 billion parameters, with fewer layers; "quick" is only to see it run.
SIZES = {
    "full": {"n_layer": 4, "n_embd": 2048, "n_ff": 8192, "n_head": 32, "n_head_kv": 8},
    "quick": {"n_layer": 4, "n_embd": 256, "n_ff": 768, "n_head": 8, "n_head_kv": 4},
}
TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q6_k", "f16")
DENSITY = 0.4
THREADS = 1  # for make bench counts processor time, which is the same on a busy machine
PROMPT = list(range(10, 42))
every_type = pytest.mark.parametrize("opened", TYPES, indirect=True)


class Opened:
    """A model with a core context, and core sets of random neurons for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.llm = EdgeLLM(path, DENSITY, n_ctx=256, n_threads=THREADS, n_threads_batch=THREADS)
        core, chooser = self.llm.llama.core, self.llm.llama.chooser
        assert core is not None
        assert chooser is not None
        self.core: CoreContext = core
        self.chooser: Chooser = chooser
        self._rng = np.random.default_rng(0)

    def core_sets(self) -> dict[int, CoreSet]:
        """New ones each time: what is as it was would not be gathered again."""
        sets = {}
        for i, ffn in enumerate(self.core.ffns):
            n = round(ffn.n_ff * DENSITY / 32) * 32
            neurons = np.sort(self._rng.choice(ffn.n_ff, n, replace=False)).astype(np.int32)
            sets[i] = CoreSet(neurons, np.ones(ffn.n_ff, dtype=np.float32))
        return sets

    def decode(self, n: int) -> None:
        """Some tokens, from the same place each time."""
        for token in range(10, 10 + n):
            self.llm.llama.eval([token])
        self.llm.llama._ctx.kv_cache_seq_rm(-1, 32, -1)
        self.llm.llama.n_tokens = 32


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def opened(request: pytest.FixtureRequest, folder: Path) -> Iterator[Opened]:
    """The model in the type that the benchmark names, ``q4_0`` if it names none."""
    type_ = getattr(request, "param", "q4_0")
    path = folder / f"{type_}.gguf"
    if not path.exists():
        sizes = SIZES[os.environ.get("COREINFER_BENCHMARK", "full")]
        make_random_gguf(path, "llama", type=type_, n_vocab=4096, n_ctx=512, **sizes)
    model = Opened(path)
    yield model
    model.llm.close()


@pytest.mark.parametrize("collecting", [False, True], ids=["dense", "collecting"])
def bench_prefill(opened: Opened, collecting: bool, benchmark: Any) -> None:
    llama = opened.llm.llama

    def prefill() -> None:
        llama.reset()
        llama.eval(PROMPT * 4)

    opened.core.collect(collecting, opened.chooser.extra)
    benchmark(prefill)
    opened.core.collect(False)
    assert bool(opened.core.statistics().n_tokens.any()) == collecting


def bench_choose(opened: Opened, benchmark: Any) -> None:
    opened.core.collect(True, opened.chooser.extra)
    opened.llm.llama.eval(PROMPT)
    opened.core.collect(False)
    chosen = benchmark(lambda: opened.chooser.choose(opened.core.statistics(), DENSITY))
    assert chosen


@every_type
def bench_down_norms(opened: Opened, benchmark: Any) -> None:
    norms = benchmark(opened.core.down_norms)
    assert all((of_ffn > 0).all() for of_ffn in norms)


@every_type
def bench_gather_and_requantise(opened: Opened, benchmark: Any) -> None:
    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        return (opened.core_sets(),), {}

    benchmark.pedantic(opened.core.set_core, setup=setup, rounds=10, warmup_rounds=1)
    assert opened.core.core_bytes < opened.core.full_bytes


def bench_activate(opened: Opened, benchmark: Any) -> None:
    """Switching on and off again, and the two graphs that are built for it."""
    opened.core.set_core(opened.core_sets())
    opened.llm.llama.eval(PROMPT)

    def switch() -> None:
        opened.core.use_core(True)
        opened.decode(1)
        opened.core.use_core(False)
        opened.decode(1)

    benchmark(switch)


@pytest.mark.parametrize("core", [False, True], ids=["dense", "core"])
@pytest.mark.parametrize("opened", ["q4_0", "q8_0", "q4_k"], indirect=True)
def bench_decode(opened: Opened, core: bool, benchmark: Any) -> None:
    opened.core.set_core(opened.core_sets())
    opened.llm.llama.eval(PROMPT)
    opened.core.use_core(core)
    benchmark(lambda: opened.decode(8))


@pytest.mark.parametrize("strategy", ["dense", "energy"])
def bench_load(opened: Opened, strategy: str, benchmark: Any) -> None:
    def load() -> None:
        density = None if strategy == "dense" else 0.5
        EdgeLLM(opened.path, density, strategy, n_ctx=256, n_threads=THREADS).close()

    benchmark.pedantic(load, rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(timer=time.perf_counter)
def bench_import(benchmark: Any) -> None:
    command = [sys.executable, "-c", "import coreinfer_edge, sys; sys.exit('torch' in sys.modules)"]
    folder = Path(__file__).resolve().parents[2]
    benchmark.pedantic(lambda: subprocess.run(command, check=True, cwd=folder), rounds=5)
