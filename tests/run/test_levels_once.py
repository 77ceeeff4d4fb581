"""Levels that are set when the model is loaded: prompts and answers run on them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from core_session import continued, core_session, edge
from reference import Reference
from test_edge_levels import NEAR, held
from test_reference import relative_error, some_tokens
from with_prior import with_prior

from coreinfer_edge import EdgeLLM
from coreinfer_edge.binding.core import context_memory
from coreinfer_edge.errors import ArgumentError, ModelFileError
from coreinfer_edge.run import load_plan as load_plan_module
from coreinfer_edge.run.core_llama import CoreLlama

RandomModel = Callable[..., Path]

ONCE: dict[str, Any] = {"strategy": "static", "levels": ["full", 3, 2], "repack": None}


@pytest.fixture(scope="module")
def model(random_model: RandomModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = random_model("llama", "q8_0", shape="small")
    return with_prior(path, tmp_path_factory.mktemp("once") / "model.gguf")


@pytest.fixture(scope="module", autouse=True)
def _needs_kernels(model: Path) -> None:
    with core_session(model, packed=True) as session:
        if not session.core.ffns[0].neuron_bytes[1]:
            pytest.skip("levels need our own kernels, which this processor has not")


def chosen(llama: CoreLlama) -> Any:
    """What was set when the model was loaded."""
    assert llama.core is not None
    assert llama.chooser is not None
    return llama.chooser.choose(llama.core.statistics(), float(llama.density or 0))


@pytest.mark.parametrize("at_once", [1, 3, None])
def test_a_prompt_is_evaluated_as_the_reference_does_with_the_same_weights(
    at_once: int | None, model: Path
) -> None:
    tokens = some_tokens()
    with edge(model, layers=[1], logits_all=True, **ONCE) as llm:
        core = chosen(llm.llama)
        for start in range(0, len(tokens), at_once or len(tokens)):
            llm.llama.eval(tokens[start : start + (at_once or len(tokens))])
        logits = llm.llama.scores[: len(tokens)].copy()
    assert set(core) == {0, 2, 3}
    reference, of_file = Reference(model), Reference(model)
    for i, of_ffn in core.items():
        held(of_ffn, reference, i)
    kept = {i: of_ffn.neurons for i, of_ffn in core.items()}
    fills = {i: of_ffn.fill for i, of_ffn in core.items()}
    assert relative_error(logits, reference.logits(tokens, kept, fills))[1] < NEAR
    assert relative_error(logits, of_file.logits(tokens))[1] > 3 * NEAR


def test_prompts_and_answers_run_on_the_levels_and_nothing_is_chosen_for_them(model: Path) -> None:
    with edge(model, **ONCE) as llm:
        for turn in range(2):
            llm.generate(some_tokens()[turn:], max_tokens=8, temperature=0)
            figures = llm.last
            assert figures is not None
            assert (figures.set_once, figures.strategy) == (True, "static")
            assert figures.choose_seconds == figures.warmup_tokens == figures.streamed_bytes == 0
            assert figures.core_tokens == figures.completion_tokens - 1
            assert figures.density == pytest.approx(0.5, abs=0.03)
            assert figures.core_ffn_bytes == pytest.approx(
                figures.density * figures.full_ffn_bytes, rel=0.03
            )


@pytest.mark.skipif(sys.platform != "linux", reason="weights stay in the file on Linux only")
def test_the_ffn_weights_are_never_in_memory_and_the_answer_is_as_if_they_were(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, weights = [], []
    for where in ("file", "memory"):
        if where == "memory":
            monkeypatch.setattr(load_plan_module, "unread_buffer_type", lambda: None)
        with edge(model, **{**ONCE, "repack": True}) as llm:
            answers.append(continued(llm, some_tokens(), 16))
            weights.append(context_memory(llm.llama.ctx).weights)
            assert llm.llama.core is not None
            n_ffn = llm.llama.core.full_bytes
    assert answers[0] == answers[1]
    assert weights[0] <= weights[1] - n_ffn


def test_what_would_change_the_levels_later_is_refused(model: Path) -> None:
    with edge(model, **ONCE) as llm:
        llm.llama.density = 0.7
        with pytest.raises(
            ArgumentError, match=r"density is 0\.7, but the levels were set for 0\.5"
        ):
            llm.generate("Hi", max_tokens=2)
    for option in ({"refresh": 8}, {"warmup": 4}):
        with pytest.raises(ArgumentError, match=f"{next(iter(option))} does not go with"):
            edge(model, **ONCE, **option)


def test_levels_are_set_once_only_with_a_prior(random_model: RandomModel) -> None:
    with pytest.raises(ArgumentError, match="needs the prior"):
        edge(random_model("llama", "q8_0", shape="small"), **ONCE)


def test_a_density_that_the_prompt_decides_sets_no_levels_once(model: Path) -> None:
    with edge(model, **{**ONCE, "density": "auto", "quality": 0.5}) as llm:
        continued(llm, some_tokens() * 4, 40)
        assert not llm.llama.run.set_once
        assert llm.llama.run.estimated_kl is not None


@pytest.mark.skipif(sys.platform != "linux", reason="weights stay in the file on Linux only")
def test_a_file_that_is_cut_after_loading_is_an_error(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(model.read_bytes())
    with EdgeLLM(path, density=0.5, **ONCE) as llm:
        llm.generate([5, 6, 7], max_tokens=2)
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size // 8)
        with pytest.raises(ModelFileError, match="cut"):
            llm.generate([300 - i for i in range(40)], max_tokens=2)
