"""EdgeLLM as a state machine: each call gives the text of a fresh model, whatever came before.

COREINFER_STATE_STEPS=100000 runs that many steps, in place of the few that the suite has time for.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from core_session import edge
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)
from make_random_gguf import make_random_gguf
from test_edge import only_ascii
from test_reference import some_tokens

from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.run import core_llama
from coreinfer_edge.run.dense_prefix import DensePrefix
from coreinfer_edge.run.llm import EdgeLLM

LlamaContext = llama_cpp._internals.LlamaContext

pytestmark = pytest.mark.slow

STEPS_EACH = 50
STEPS = int(os.environ.get("COREINFER_STATE_STEPS", "300"))

END = 3  # <|im_end|>, the last of the control tokens
SYSTEM = [*some_tokens(20), END]
PROMPTS = [
    [5],
    some_tokens(30),
    [*some_tokens(30), *some_tokens(12)],
    SYSTEM,
    [*SYSTEM, 7, 8, 9],
    [*SYSTEM, *some_tokens(18), END, 6],
    [*SYSTEM, *some_tokens(18), END, 6, *some_tokens(25), END, 6],
]
CHATS = [
    [{"role": "user", "content": "the man and the hat"}],
    [
        {"role": "user", "content": "the man and the hat"},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "the hat and the cat and the man"},
    ],
]
Call = tuple[str, int, int]  # generate or chat, which prompt, tokens

calls = st.one_of(
    st.tuples(st.just("generate"), st.integers(0, len(PROMPTS) - 1), st.integers(1, 7)),
    st.tuples(st.just("chat"), st.integers(0, len(CHATS) - 1), st.integers(1, 7)),
)
densities: st.SearchStrategy[Any] = st.sampled_from([0.5, 0.25, 1.0, "auto", None])
steps_done = 0
goes_on = 0  # how often a prompt went on from what was in the cache


def opened(path: Path, density: Any) -> EdgeLLM:
    llm = edge(
        path, density=0.5, repack=None, warmup=2, refresh=3, n_ctx=128, n_batch=32, n_ubatch=32
    )
    llm.llama.density = density
    return llm


class Uses(RuleBasedStateMachine):
    path: Path
    bias: dict[int, float]
    known: dict[tuple[Any, Call], str]

    def __init__(self) -> None:
        super().__init__()
        self.llm = opened(self.path, 0.5)
        self.density: Any = 0.5
        self.states: list[Any] = []
        self.stream: Iterator[str] | None = None
        self.text = ""  # of the stream
        self.wanted = ""
        self.stale = False  # whether another call has begun since
        self.over = False

    def teardown(self) -> None:
        self.llm.close()

    def ask(self, llm: EdgeLLM, call: Call, stream: bool = False) -> Any:
        kind, which, n = call
        options: dict[str, Any] = {"max_tokens": n, "temperature": 0, "logit_bias": self.bias}
        if kind == "chat":
            return llm.chat(CHATS[which], stream=stream, **options)
        return (llm.stream if stream else llm.generate)(PROMPTS[which], **options)

    def expected(self, call: Call) -> str:
        """The text of a model loaded for this call alone."""
        key = self.density, call
        if key not in self.known:
            with opened(self.path, self.density) as fresh:
                self.known[key] = self.ask(fresh, call)
        return self.known[key]

    def step(self) -> None:
        global steps_done
        steps_done += 1

    @rule(call=calls)
    def call(self, call: Call) -> None:
        self.step()
        self.stale = True
        assert self.ask(self.llm, call) == self.expected(call)

    @rule(call=calls, n=st.integers(1, 12), after=st.booleans())
    def interrupt(self, call: Call, n: int, after: bool) -> None:
        """Break a call off at one of its evaluations, those of a search among them."""
        self.step()
        self.stale = True
        left = n
        decode = LlamaContext.decode

        def interrupted(context: LlamaContext, batch: Any) -> None:
            nonlocal left
            left -= 1
            if left or after:
                decode(context, batch)
            if not left:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            patched.setattr(LlamaContext, "decode", interrupted)
            self.ask(self.llm, call)

    @rule(density=densities)
    def set_density(self, density: Any) -> None:
        self.step()
        self.density = self.llm.llama.density = density

    @rule(call=calls)
    def open_stream(self, call: Call) -> None:
        self.step()
        self.stream = self.ask(self.llm, call, stream=True)
        self.text, self.wanted = "", self.expected(call)
        piece = next(self.stream, None)
        self.stale, self.over = False, piece is None
        self.text += piece or ""

    @precondition(lambda self: self.stream is not None)
    @rule(n=st.integers(1, 8))
    def read(self, n: int) -> None:
        self.step()
        assert self.stream is not None
        for _ in range(n):
            try:
                piece = next(self.stream, None)
            except ArgumentError as error:
                if not self.stale or not re.search("another call|closed", str(error)):
                    raise
                self.over = True
                self.stream = None
                return
            assert self.over or not self.stale or piece is None
            if piece is None:
                assert self.text == self.wanted
                self.over = True
                return
            self.text += piece
            assert self.wanted.startswith(self.text)

    @precondition(lambda self: self.stream is not None)
    @rule(by_dropping=st.booleans())
    def end_stream(self, by_dropping: bool) -> None:
        self.step()
        if not by_dropping:
            self.stream.close()  # type: ignore[union-attr]
        self.stream = None

    @rule()
    def reset(self) -> None:
        self.step()
        self.stale = True
        self.llm.llama.reset()

    @rule(tokens=st.lists(st.integers(4, 300), min_size=1, max_size=6), anew=st.booleans())
    def evaluate_by_hand(self, tokens: list[int], anew: bool) -> None:
        self.step()
        self.stale = True
        if anew:
            self.llm.llama.reset()
        if self.llm.llama.n_tokens + len(tokens) < 128:
            self.llm.llama.eval(tokens)

    @rule()
    def save(self) -> None:
        self.step()
        self.states = [*self.states[-2:], self.llm.llama.save_state()]

    @precondition(lambda self: self.states)
    @rule(which=st.integers(0, 2))
    def load(self, which: int) -> None:
        self.step()
        self.stale = True
        self.llm.llama.load_state(self.states[which % len(self.states)])

    @rule(which=st.lists(calls, min_size=2, max_size=4), streams=st.integers(0, 3))
    def call_from_threads(self, which: list[Call], streams: int) -> None:
        self.step()
        self.stale = True
        expected = [self.expected(call) for call in which]

        def one(i: int) -> str | None:
            if i >= streams:
                return str(self.ask(self.llm, which[i]))
            try:
                return "".join(self.ask(self.llm, which[i], stream=True))
            except ArgumentError as error:
                if "another call" not in str(error):
                    raise
                return None

        with ThreadPoolExecutor(len(which)) as pool:
            for i, text in enumerate(pool.map(one, range(len(which)))):
                assert text == expected[i] or (text is None and i < streams)

    @rule(call=calls, density=st.sampled_from([0.5, 0.25, "auto"]), in_threads=st.booleans())
    def close(self, call: Call, density: Any, in_threads: bool) -> None:
        self.step()
        self.stale = True
        expected = self.expected(call)

        def one(_: int) -> str | None:
            try:
                return str(self.ask(self.llm, call))
            except ArgumentError as error:
                if "closed" not in str(error):
                    raise
                return None

        if in_threads:
            with ThreadPoolExecutor(2) as pool:
                texts = pool.map(one, range(2))
                self.llm.close()
                assert all(text in (None, expected) for text in texts)
        else:
            self.llm.close()
        assert one(0) is None
        self.llm, self.density = opened(self.path, density), density


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_call_gives_the_text_of_a_fresh_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = DensePrefix.common

    def counted(prefix: DensePrefix, prompt: Sequence[int], n_cached: int) -> int:
        global goes_on
        end = common(prefix, prompt, n_cached)
        goes_on += end > 0
        return end

    monkeypatch.setattr(DensePrefix, "common", counted)
    # or these prompts would be too short to have parts that end with a message
    monkeypatch.setattr(core_llama, "LEAST_TOKENS", 16)
    # of a type that there are kernels for, so that the default has our layout
    Uses.path = make_random_gguf(
        tmp_path / "model.gguf", "llama", type="q4_0", shape="small", n_layer=3
    )
    Uses.known = {}
    with opened(Uses.path, 0.5) as llm:
        Uses.bias = only_ascii(llm)
        assert llm.llama.tokenize(b"<|im_end|>", add_bos=False, special=True) == [END]
    try:
        run_state_machine_as_test(
            Uses,
            settings=settings(
                max_examples=max(1, STEPS // STEPS_EACH),
                stateful_step_count=STEPS_EACH,
                deadline=None,
                database=None,
                derandomize="COREINFER_STATE_STEPS" not in os.environ,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        print(f"{steps_done} steps, {len(Uses.known)} different calls, {goes_on} went on")
    assert goes_on > steps_done // 50
