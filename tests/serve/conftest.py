"""Servers for the tests: they run in a thread of the test's process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from serving import Served, serving
from test_hostile_files import pair, rewrite

from coreinfer_edge.run.llm import EdgeLLM


@pytest.fixture(scope="session")
def demo_llm(smollm2: Path) -> Iterator[EdgeLLM]:
    # the seed: the page gives none
    with EdgeLLM(smollm2, n_ctx=1024, n_threads=1, n_threads_batch=2, seed=1) as llm:
        yield llm


@pytest.fixture(scope="session")
def demo(demo_llm: EdgeLLM) -> Iterator[Served]:
    """A server of SmolLM2."""
    with serving(demo_llm, name="demo") as served:
        yield served


@pytest.fixture(scope="session")
def client(demo: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def base_llm(
    random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EdgeLLM]:
    """A small model without a chat template."""
    no_template = {"tokenizer.chat_template": pair("other", "str", "none")}
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    with EdgeLLM(rewrite(random_model("llama"), path, no_template), n_ctx=128, n_threads=1) as llm:
        yield llm
