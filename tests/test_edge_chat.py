"""EdgeLLM over several calls: what is kept of earlier turns, of the same prompt, and of caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from core_session import CoreSession, continued, core_session, edge
from test_reference import some_tokens

from coreinfer_edge.choose import choose, spared
from coreinfer_edge.core_context import CoreContext, CoreSet, Extra, Statistics
from coreinfer_edge.core_llama import TURN_DECAY, WARMUP_WEIGHT
from coreinfer_edge.edge import EdgeLLM
from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.strategies import Evidence, energy

RandomModel = Callable[..., Path]

N_LAYER = 8
FIRST, NEW = some_tokens(60)[:40], some_tokens(60)[40:]


@pytest.fixture
def model(random_model: RandomModel) -> Path:
    return random_model("llama", n_layer=N_LAYER)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Mapping[int, CoreSet]]]:
    """The core sets that are set, in order."""
    sets: list[Mapping[int, CoreSet]] = []
    set_core = CoreContext.set_core

    def spy(core: CoreContext, core_set: Mapping[int, CoreSet]) -> None:
        sets.append(core_set)
        set_core(core, core_set)

    with monkeypatch.context() as patched:
        patched.setattr(CoreContext, "set_core", spy)
        yield sets


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of tokens in each evaluation, in order."""
    counts: list[int] = []
    evaluate = llama_cpp.Llama.eval

    def spy(llama: llama_cpp.Llama, tokens: Sequence[int]) -> None:
        counts.append(len(tokens))
        evaluate(llama, tokens)

    with monkeypatch.context() as patched:
        patched.setattr(llama_cpp.Llama, "eval", spy)
        yield counts


def assert_same_statistics(actual: Statistics | None, expected: Statistics) -> None:
    assert actual is not None
    np.testing.assert_allclose(actual.n_tokens, expected.n_tokens)
    for i in range(N_LAYER):
        np.testing.assert_allclose(actual.sum[i], expected.sum[i], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(actual.sum_sq[i], expected.sum_sq[i], rtol=1e-4, atol=1e-4)


def assert_same_core(actual: Mapping[int, CoreSet], expected: Mapping[int, CoreSet]) -> None:
    assert list(actual) == list(expected)
    for i in actual:
        np.testing.assert_array_equal(actual[i].neurons, expected[i].neurons)
        np.testing.assert_allclose(actual[i].fill, expected[i].fill, rtol=1e-4, atol=1e-5)


# --- a second turn --------------------------------------------------------------------------------


def test_a_second_turn_is_dense_for_the_new_tokens_and_chooses_again_with_the_first_decayed(
    model: Path, chosen: list[Mapping[int, CoreSet]], evaluated: list[int]
) -> None:
    warmup, n = 3, 12
    with edge(model, warmup=warmup, logits_all=True) as llm:
        first = continued(llm, FIRST, n)
        second = continued(llm, [*FIRST, *first, *NEW], n)
        history = llm.llama._history
    assert evaluated == [40, *[1] * 11, 21, *[1] * 11]
    assert len(chosen) == 2

    def take(session: CoreSession, tokens: Sequence[int], answer: Sequence[int]) -> Statistics:
        """By hand what one turn should be; the statistics of its dense tokens, prompt first."""
        session.core.use_core(False)
        session.core.clear_statistics()
        session.core.collect(True, Extra(normalized=True))
        logits = [session.run(tokens)[-1:]]
        prompt = session.core.statistics()
        session.core.clear_statistics()
        logits.append(session.run(answer[:warmup], 1))
        of_warmup = session.core.statistics()
        dense = prompt.plus(of_warmup, 1.0)
        session.core.collect(False)
        session.core.set_core(chosen[len(taken)])
        session.core.use_core(True)
        logits.append(session.run(answer[warmup:-1], 1))
        assert np.concatenate(logits).argmax(axis=1).tolist() == list(answer)
        taken.append((prompt, dense, of_warmup))
        return dense

    taken: list[tuple[Statistics, Statistics, Statistics]] = []
    with core_session(model) as session:
        norms = session.core.down_norms()
        take(session, FIRST, first)
        take(session, [first[-1], *NEW], second)
    (_, first_dense, first_warmup), (second_prompt, second_dense, second_warmup) = taken
    assert_same_statistics(history.at_prompt, second_prompt.plus(first_dense, TURN_DECAY))
    assert_same_statistics(history.at_end, second_dense.plus(first_dense, TURN_DECAY))

    densities = spared(range(N_LAYER), N_LAYER, 0.5)
    for core, statistics in (
        (chosen[0], first_dense.plus(first_warmup, WARMUP_WEIGHT - 1)),
        (
            chosen[1],
            second_dense.plus(first_dense, TURN_DECAY).plus(second_warmup, WARMUP_WEIGHT - 1),
        ),
    ):
        assert_same_core(core, choose(energy(Evidence(statistics, None, norms)), densities))
    assert any((chosen[0][i].neurons != chosen[1][i].neurons).any() for i in chosen[0])


def test_a_third_turn_carries_the_first_at_the_decay_squared(model: Path) -> None:
    with edge(model, warmup=10**6) as llm:
        turns = [list(FIRST)]
        collected = []
        for _ in range(3):
            history = llm.llama._history
            before = history.at_end
            answer = continued(llm, turns[-1], 6)
            at_end = history.at_end
            assert at_end is not None
            collected.append(at_end if before is None else at_end.plus(before, -TURN_DECAY))
            turns.append([*turns[-1], *answer, *NEW])
        one, two, three = collected
        expected = three.plus(two, TURN_DECAY).plus(one, TURN_DECAY**2)
        assert_same_statistics(llm.llama._history.at_end, expected)


def test_a_conversation_that_was_left_for_another_carries_nothing_over(model: Path) -> None:
    with edge(model, warmup=0) as llm, edge(model, warmup=0) as fresh:
        continued(llm, FIRST, 12)
        other = [FIRST[0] + 1, *NEW]
        assert continued(llm, other, 12) == continued(fresh, other, 12)
        expected = fresh.llama._history.at_prompt
        assert expected is not None
        assert_same_statistics(llm.llama._history.at_prompt, expected)


def test_a_prompt_that_shares_most_of_the_last_carries_that_prompt_and_not_its_answer(
    model: Path,
) -> None:
    with edge(model, warmup=0) as llm:
        continued(llm, FIRST, 30)
        continued(llm, [*FIRST[:36], *NEW], 4)
        at_prompt = llm.llama._history.at_prompt
        assert at_prompt is not None
        assert at_prompt.n_tokens[0] == len(NEW) + TURN_DECAY * len(FIRST)


def test_a_second_turn_cut_short_by_an_interrupt_still_carries_the_first(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(llama: llama_cpp.Llama, tokens: Sequence[int]) -> None:
        raise KeyboardInterrupt

    with edge(model, warmup=2) as llm, edge(model, warmup=2) as undisturbed:
        texts = []
        for either in (llm, undisturbed):
            second = [*FIRST, *continued(either, FIRST, 12), *NEW]
            if either is llm:
                with monkeypatch.context() as patched:
                    patched.setattr(llama_cpp.Llama, "eval", interrupted)
                    with pytest.raises(KeyboardInterrupt):
                        continued(llm, second, 12)
            texts.append(continued(either, second, 12))
        assert texts[0] == texts[1]
        expected = undisturbed.llama._history.at_prompt
        assert expected is not None
        assert_same_statistics(llm.llama._history.at_prompt, expected)


# --- the same prompt, cached prompts --------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 4, "auto"])
def test_the_same_prompt_again_gives_the_same_core_set_and_the_same_greedy_text(
    warmup: Any, model: Path, chosen: list[Mapping[int, CoreSet]], evaluated: list[int]
) -> None:
    with edge(model, warmup=warmup) as llm:
        first = continued(llm, FIRST, 80)
        for _ in range(2):
            evaluated.clear()
            assert continued(llm, FIRST, 80) == first
            assert evaluated[0] == 1  # the rest of the prompt is in the KV cache
    assert len(chosen) == 3
    assert_same_core(chosen[1], chosen[0])
    assert_same_core(chosen[2], chosen[0])


def test_the_same_second_turn_again_gives_the_same_text(model: Path) -> None:
    with edge(model, warmup=2) as llm:
        second = [*FIRST, *continued(llm, FIRST, 12), *NEW]
        text = continued(llm, second, 12)
        assert continued(llm, second, 12) == text
        assert continued(llm, second, 12) == text


def test_a_prompt_that_is_already_evaluated_whole_goes_on_from_what_is_known(
    model: Path, evaluated: list[int]
) -> None:
    with edge(model, warmup=0) as llm:
        answer = continued(llm, FIRST, 12)
        evaluated.clear()
        # What was evaluated so far, to the last token.
        again = [*FIRST, *answer[:-1]]
        assert continued(llm, again, 6)
        assert evaluated[0] == 0
        assert llm.llama.run.density < 1
        # A shorter one, of which one token is evaluated again.
        evaluated.clear()
        assert continued(llm, FIRST[:30], 6)
        assert evaluated[0] == 1
        assert llm.llama.run.density < 1


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_a_ram_cache_brings_prompts_back(density: float, model: Path, evaluated: list[int]) -> None:
    with edge(model, density=density, warmup=2) as llm:
        llm.llama.set_cache(llama_cpp.LlamaRAMCache())
        others = [FIRST[0] + 1, *NEW]
        text = llm.generate(FIRST, max_tokens=20, temperature=0)
        llm.generate(others, max_tokens=20, temperature=0)
        evaluated.clear()
        again = llm.generate(FIRST, max_tokens=20, temperature=0)
        assert evaluated[0] == 1
        assert len(again) > 0
        assert llm.last is not None
        assert llm.last.prompt_tokens == len(FIRST)
        assert (llm.last.density < 1) == (density < 1)
        if density == 1:
            assert again == text


# --- chat -----------------------------------------------------------------------------------------

MESSAGES = [
    {"role": "system", "content": "a hat"},
    {"role": "user", "content": "the man and the hat"},
]


def test_a_chat_is_a_completion_of_the_messages_in_the_models_template(model: Path) -> None:
    with edge(model, warmup=2) as llm:
        answer = llm.chat(MESSAGES, max_tokens=20, temperature=0)
        assert llm.last is not None
        figures = llm.last
        prompt = (
            "<|bos|><|im_start|>system\na hat<|im_end|>\n"
            "<|im_start|>user\nthe man and the hat<|im_end|>\n<|im_start|>assistant\n"
        )
        tokens = llm.llama.tokenize(prompt.encode(), add_bos=False, special=True)
        assert figures.prompt_tokens == len(tokens)
        assert llm.generate(tokens, max_tokens=20, temperature=0) == answer
        assert figures.density == llm.last.density < 1


def test_a_streamed_chat_gives_the_same_text_piece_by_piece(model: Path) -> None:
    with edge(model, warmup=2) as llm:
        ascii_only = {
            token: -100.0
            for token in range(llm.llama.n_vocab())
            if not llm.llama.detokenize([token]).isascii()
        }
        options: dict[str, Any] = {
            "max_tokens": 30,
            "temperature": 0,
            "logit_bias": ascii_only,
        }
        text = llm.chat(MESSAGES, **options)
        pieces = list(llm.chat(MESSAGES, stream=True, **options))
    assert "".join(pieces) == text
    assert len(pieces) > 10


def test_the_next_turn_of_a_chat_evaluates_only_what_is_new(
    smollm2: Path, evaluated: list[int]
) -> None:
    with EdgeLLM(smollm2, n_ctx=512, warmup=2, n_threads=1, n_threads_batch=1) as llm:
        messages: list[dict[str, Any]] = [{"role": "user", "content": "Name a colour."}]
        answer = llm.chat(messages, max_tokens=8, temperature=0)
        assert llm.last is not None
        n_first = llm.last.prompt_tokens
        assert evaluated[0] == n_first
        messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "And another?"},
        ]
        evaluated.clear()
        assert llm.chat(messages, max_tokens=8, temperature=0)
        assert evaluated[0] < llm.last.prompt_tokens - n_first
        assert llm.last.density < 1


def test_a_chat_without_messages_is_refused(model: Path) -> None:
    with edge(model) as llm:
        with pytest.raises(ArgumentError, match="messages is empty"):
            llm.chat([])
        with pytest.raises(ArgumentError, match="messages is empty"):
            llm.chat([], stream=True)
