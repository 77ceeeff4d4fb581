"""What one call asks for itself: density, quality, an end of its own, a look at each token."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coreinfer_edge.choose.statistics import Floats
from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.run.figures import Figures
from coreinfer_edge.run.llm import EdgeLLM

PROMPT = list(range(3, 40))


@pytest.fixture(scope="module")
def model(random_model: Callable[..., Path]) -> Path:
    return random_model("llama", n_layer=8, n_ff=160)


@pytest.fixture
def llm(model: Path) -> Iterator[EdgeLLM]:
    with EdgeLLM(model, n_threads=1, warmup=4, strategy="energy", density=0.9) as llm:
        yield llm


def last(llm: EdgeLLM) -> Figures:
    assert llm.last is not None
    return llm.last


def test_a_density_of_one_call_holds_for_that_call_alone(model: Path, llm: EdgeLLM) -> None:
    before = llm.generate(PROMPT, max_tokens=20, temperature=0)
    text = llm.generate(PROMPT, max_tokens=20, temperature=0, density=0.4)
    assert last(llm).density == pytest.approx(0.4, abs=0.05)
    assert llm.generate(PROMPT, max_tokens=20, temperature=0) == before
    assert last(llm).density == pytest.approx(0.9, abs=0.05)
    with EdgeLLM(model, n_threads=1, warmup=4, density=0.4) as other:
        assert other.generate(PROMPT, max_tokens=20, temperature=0) == text


def test_the_streams_of_a_model_can_have_densities_of_their_own(llm: EdgeLLM) -> None:
    for density in (0.4, 0.6):
        list(llm.stream(PROMPT, max_tokens=20, temperature=0, density=density))
        assert last(llm).density == pytest.approx(density, abs=0.05)


def test_a_quality_of_one_call_means_that_the_density_is_found(llm: EdgeLLM) -> None:
    llm.generate(PROMPT, max_tokens=20, temperature=0, quality=1e6)
    coarse = last(llm)
    llm.generate(PROMPT, max_tokens=20, temperature=0, quality=1e-9)
    fine = last(llm)
    assert coarse.estimated_kl is not None
    assert coarse.density < fine.density


@pytest.mark.parametrize("asked", [{"density": 0}, {"density": 1.5}, {"quality": -1}])
def test_what_a_call_cannot_have_is_refused_and_the_next_call_works(
    llm: EdgeLLM, asked: dict[str, float]
) -> None:
    with pytest.raises(ArgumentError, match=next(iter(asked))):
        llm.generate(PROMPT, max_tokens=4, **asked)
    llm.generate(PROMPT, max_tokens=4)


def test_a_model_loaded_dense_refuses_a_density_of_a_call(model: Path) -> None:
    with EdgeLLM(model, density=1.0) as dense, pytest.raises(ArgumentError, match="loaded dense"):
        dense.generate(PROMPT, max_tokens=4, density=0.5)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_with_the_token_at_which_it_is_told_to(llm: EdgeLLM, stream: bool) -> None:
    tokens: list[int] = []

    def on_token(token: int, logits: Floats) -> None:
        tokens.append(token)

    answer = llm.create_completion(
        PROMPT,
        stream=stream,
        max_tokens=50,
        temperature=0,
        stop_when=lambda: len(tokens) == 7,
        on_token=on_token,
    )
    if stream:
        *_, answer = answer
    assert answer["choices"][0]["finish_reason"] == "length"
    assert last(llm).completion_tokens == len(tokens) == 7
    assert not last(llm).context_full


def test_a_prompt_is_left_between_two_of_its_parts(model: Path) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3  # before the first part, the second, the third

    with EdgeLLM(model, n_threads=1, n_batch=16) as llm:
        whole = llm.generate(PROMPT, max_tokens=5, temperature=0)
        llm.llama.reset()
        assert llm.generate(PROMPT, max_tokens=5, temperature=0, stop_when=stop) == ""
        assert llm.llama.n_tokens == 32
        assert llm.generate(PROMPT, max_tokens=5, temperature=0) == whole


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_can_be_stopped_before_anything_is_evaluated(model: Path, stream: bool) -> None:
    messages = [{"role": "user", "content": "hello"}]
    with EdgeLLM(model, n_threads=1) as llm:
        answer = llm.create_chat_completion(messages, stream=stream, stop_when=lambda: True)
        if stream:
            *_, answer = answer
        assert answer["choices"][0]["finish_reason"] == "length"
        assert last(llm).completion_tokens == 0


def test_a_trial_of_densities_is_left_when_the_answer_is_to_end(llm: EdgeLLM) -> None:
    ending = False

    def on_token(token: int, logits: Floats) -> None:
        nonlocal ending
        ending = llm.llama.run.warmup_left == 0

    asked_after = 0

    def stop() -> bool:
        nonlocal asked_after
        asked_after += ending
        return asked_after > 1  # the first is before the step, the second in its trial

    llm.generate(
        PROMPT, max_tokens=30, temperature=0, density="auto", stop_when=stop, on_token=on_token
    )
    assert last(llm).core_tokens == 0
    text = llm.generate(PROMPT, max_tokens=20, temperature=0)
    llm.llama.reset()
    assert llm.generate(PROMPT, max_tokens=20, temperature=0) == text


def test_the_logits_of_each_token_are_those_that_it_was_drawn_from(llm: EdgeLLM) -> None:
    drawn: list[tuple[int, int]] = []
    llm.generate(
        PROMPT,
        max_tokens=20,
        temperature=0,
        on_token=lambda token, logits: drawn.append((token, int(np.argmax(logits)))),
    )
    assert len(drawn) >= 20
    assert all(token == likeliest for token, likeliest in drawn)


ASKED: list[dict[str, Any]] = [
    {"density": "auto"},
    {"quality": 0.5},
    {"density": 0.3},
    {"density": 0.97},
    {"density": 1.0},
    {"exact": True},
    {"exact": False},
]
# Makes each of the calls, and prints the figure or the error of each; the process must not end.
SCRIPT = """
import json, sys
from coreinfer_edge import CoreInferError, EdgeLLM
path, options, calls = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
with EdgeLLM(path, n_threads=1, n_threads_batch=1, n_ctx=512, **options) as llm:
    for asked in calls:
        try:
            llm.generate("The history of Rome begins with the founding", max_tokens=8,
                         temperature=0, **asked)
            print(f"density {llm.last.density:.2f}")
        except CoreInferError as error:
            print(type(error).__name__, error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"memory": 180_000_000, "density": 0.5},
        {"memory": 180_000_000, "density": 0.3, "exact": True},
        {"memory": 2_000_000_000, "density": 0.5},
        {"memory": 2_000_000_000},
        {"warmup": 0},
    ],
    ids=str,
)
def test_what_a_call_asks_for_is_an_answer_or_a_refusal_wherever_the_weights_are(
    smollm2: Path, options: dict[str, Any]
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(smollm2), json.dumps(options), json.dumps(ASKED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(ASKED)
    assert all(line.startswith(("density ", "ArgumentError ")) for line in lines), lines
    assert any(line.startswith("density ") for line in lines)
