"""EdgeLLM over several calls: what is kept of earlier turns, of the same prompt, and of caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_session import continued, core_session, edge
from test_reference import some_tokens

from coreinfer_edge.binding.core import CoreContext
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.choose.chooser import choose, spared
from coreinfer_edge.choose.statistics import CoreSet, Extra
from coreinfer_edge.choose.strategies import Evidence, energy
from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.run import core_llama
from coreinfer_edge.run.core_llama import CoreLlama
from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.run.session import WARMUP_WEIGHT

RandomModel = Callable[..., Path]

N_LAYER = 8
FIRST, NEW = some_tokens(60)[:40], some_tokens(60)[40:]


LEAST_TOKENS = 16


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts here are short, and so are the parts that they are evaluated in."""
    monkeypatch.setattr(core_llama, "LEAST_TOKENS", LEAST_TOKENS)


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


def assert_same_core(actual: Mapping[int, CoreSet], expected: Mapping[int, CoreSet]) -> None:
    assert list(actual) == list(expected)
    for i in actual:
        np.testing.assert_array_equal(actual[i].neurons, expected[i].neurons)
        np.testing.assert_allclose(actual[i].fill, expected[i].fill, rtol=1e-4, atol=1e-5)


# --- the same call gives the same text ------------------------------------------------------------


def end_of_message(llm: EdgeLLM) -> list[int]:
    return llm.llama.tokenize(b"<|im_end|>", add_bos=False, special=True)


def test_a_second_turn_evaluates_the_answer_dense_and_weighs_all_tokens_of_the_prompt_alike(
    model: Path, chosen: list[Mapping[int, CoreSet]], evaluated: list[int]
) -> None:
    warmup, n = 3, 12
    with edge(model, warmup=warmup, logits_all=True) as llm:
        end = end_of_message(llm)
        first_prompt = [*FIRST, *end, 5]
        first = continued(llm, first_prompt, n)
        second_prompt = [*first_prompt, *first, *NEW]
        second = continued(llm, second_prompt, n)
    assert evaluated == [41, 1, *[1] * 11, 33, *[1] * 11]
    assert len(chosen) == 2

    densities = spared(range(N_LAYER), N_LAYER, 0.5)
    with core_session(model) as session:
        norms = session.core.down_norms()
        for core, prompt, answer in zip(
            list(chosen), (first_prompt, second_prompt), (first, second), strict=True
        ):
            session.restart()
            session.core.use_core(False)
            session.core.clear_statistics()
            session.core.collect(True, Extra(normalized=True))
            logits = [session.run(prompt)[-1:]]
            of_prompt = session.core.statistics()
            session.core.clear_statistics()
            logits.append(session.run(answer[:warmup], 1))
            weighted = of_prompt.plus(session.core.statistics(), WARMUP_WEIGHT)
            session.core.collect(False)
            assert_same_core(core, choose(energy(Evidence(weighted, None, norms)), densities))
            session.core.set_core(core)
            session.core.use_core(True)
            logits.append(session.run(answer[warmup:-1], 1))
            assert np.concatenate(logits).argmax(axis=1).tolist() == answer
    assert any((chosen[0][i].neurons != chosen[1][i].neurons).any() for i in chosen[0])


@pytest.mark.parametrize("options", [{"warmup": 2}, {"refresh": 3}, {"density": "auto"}])
def test_a_second_turn_is_to_the_last_bit_what_a_fresh_model_makes_of_it(
    options: dict[str, Any], model: Path
) -> None:
    with edge(model, **options) as llm, edge(model, **options) as fresh:
        end = end_of_message(llm)
        prompt = [*FIRST, *end, 5]
        for turn in range(3):
            answer = continued(llm, prompt, 12)
            if turn > 0:
                fresh.llama.reset()
                assert continued(fresh, prompt, 12) == answer
                ours, theirs = llm.llama.session.of_prompt, fresh.llama.session.of_prompt
                assert ours is not None
                assert theirs is not None
                for i in range(N_LAYER):
                    np.testing.assert_array_equal(ours.sum_sq[i], theirs.sum_sq[i])
            prompt = [*prompt, *answer, *end, *NEW, *some_tokens(30), *end, 5]


@pytest.mark.parametrize("density", [0.5, "auto"])
def test_a_prompt_gives_the_same_text_whatever_was_asked_in_between(
    density: Any, model: Path, chosen: list[Mapping[int, CoreSet]]
) -> None:
    with edge(model, density=density, warmup=2) as llm:
        end = end_of_message(llm)
        prompt = [*FIRST, *end, 5]
        others = [
            [*NEW, 7],
            [*FIRST, *end, 6, *NEW],
            [*FIRST[:20], *NEW],
            [*prompt, *NEW],
            prompt[:-1],
            FIRST[:39],
        ]
        first = continued(llm, prompt, 30)
        core = chosen[-1]
        for other in others:
            continued(llm, other, 12)
            assert continued(llm, prompt, 30) == first
            for i in core:
                np.testing.assert_array_equal(chosen[-1][i].neurons, core[i].neurons)


def test_a_system_prompt_is_evaluated_once_for_several_conversations(
    model: Path, evaluated: list[int]
) -> None:
    with edge(model, warmup=2) as llm:
        end = end_of_message(llm)
        system = [*FIRST, *end]
        for new in (NEW, some_tokens(9), [*NEW, 6, 7]):
            evaluated.clear()
            continued(llm, [*system, *new], 12)
            continued(llm, [*system, *new, *some_tokens(40), *end, 5], 12)
        assert evaluated[0] == len(new)


def test_a_second_turn_cut_short_by_an_interrupt_gives_its_text_when_asked_again(
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


# --- dense after core -----------------------------------------------------------------------------


@pytest.mark.parametrize("by_messages", [False, True])
def test_density_1_after_core_answers_is_what_llama_cpp_gives_without_them(
    by_messages: bool, model: Path
) -> None:
    with edge(model, density=0.3, warmup=0) as llm:
        end = end_of_message(llm) if by_messages else []
        prompt = [*FIRST, *end, 5]
        answer = continued(llm, prompt, 20)
        second = [*prompt, *answer, *end, *NEW]
        llm.llama.density = 1.0
        logits = {}
        for at in ("after core", "after dense"):
            text = continued(llm, second, 30)
            logits[at] = (text, next_logits(llm.llama))
        llm.llama.density = 0.3
        continued(llm, [*second, *text, *NEW], 4)
        llm.llama.density = 1.0
        logits["after core again"] = (continued(llm, second, 30), next_logits(llm.llama))
    with edge(model, strategy="dense") as llm:
        expected = (continued(llm, second, 30), next_logits(llm.llama))
    for text, values in logits.values():
        assert text == expected[0]
        np.testing.assert_array_equal(values, expected[1])


def next_logits(llama: CoreLlama) -> Any:
    return np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),)).copy()


@pytest.mark.parametrize("options", [{"density": 1.0}, {"strategy": "dense"}])
def test_a_model_loaded_dense_refuses_a_density_set_later(
    options: dict[str, Any], model: Path
) -> None:
    with edge(model, **options) as llm:
        text = llm.generate(FIRST, max_tokens=4, temperature=0)
        llm.llama.density = 0.5
        with pytest.raises(ArgumentError, match=r"density is 0\.5, but .* was loaded dense"):
            llm.generate(FIRST, max_tokens=4, temperature=0)
        llm.llama.density = 1.0
        assert llm.generate(FIRST, max_tokens=4, temperature=0) == text


# --- cached prompts -------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_a_ram_cache_brings_prompts_back_with_their_statistics(
    density: float, model: Path, evaluated: list[int]
) -> None:
    # dense, prompts go on from a full batch
    with edge(model, density=density, warmup=2, n_batch=len(FIRST) + 1) as llm:
        prompt = [*FIRST, *end_of_message(llm), 5]
        text = llm.generate(prompt, max_tokens=20, temperature=0)
        llm.llama.set_cache(llama_cpp.LlamaRAMCache())
        others = [FIRST[0] + 1, *NEW]
        llm.generate(prompt, max_tokens=20, temperature=0)
        llm.generate(others, max_tokens=20, temperature=0)
        evaluated.clear()
        again = llm.generate(prompt, max_tokens=20, temperature=0)
        assert evaluated[0] == 1
        assert llm.last is not None
        assert llm.last.prompt_tokens == len(prompt)
        assert (llm.last.density < 1) == (density < 1)
        assert again == text


def test_a_state_saved_without_statistics_is_evaluated_anew(model: Path) -> None:
    prompt = [*FIRST, *NEW]
    with edge(model, density=1.0) as llm:
        llm.generate(prompt, max_tokens=20, temperature=0)
        state = llm.llama.save_state()
    with edge(model, warmup=2) as llm:
        text = llm.generate(prompt, max_tokens=20, temperature=0)
        llm.llama.load_state(state)
        assert llm.generate(prompt, max_tokens=20, temperature=0) == text


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


def test_the_next_turn_of_a_chat_does_not_evaluate_the_messages_before_again(
    smollm2: Path, evaluated: list[int]
) -> None:
    with EdgeLLM(smollm2, 0.5, n_ctx=512, warmup=2, n_threads=1, n_threads_batch=1) as llm:
        messages: list[dict[str, Any]] = [{"role": "user", "content": "Name a colour."}]
        answer = llm.chat(messages, max_tokens=8, temperature=0)
        assert llm.last is not None
        n_first = llm.last.prompt_tokens
        assert sum(evaluated[:2]) == n_first  # the message, and how the answer begins
        messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "And another?"},
        ]
        evaluated.clear()
        assert llm.chat(messages, max_tokens=8, temperature=0)
        # the messages up to an end that is not too near the one before
        assert sum(n for n in evaluated if n > 1) <= llm.last.prompt_tokens - LEAST_TOKENS
        assert llm.last.density < 1


def test_a_chat_without_messages_is_refused(model: Path) -> None:
    with edge(model) as llm:
        with pytest.raises(ArgumentError, match="messages is empty"):
            llm.chat([])
        with pytest.raises(ArgumentError, match="messages is empty"):
            llm.chat([], stream=True)
