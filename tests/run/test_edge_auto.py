"""density="auto", refresh, layers, and every strategy, through EdgeLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_session import continued, core_session, edge
from test_reference import some_tokens

from coreinfer_edge.calibrate.convert import write_with_prior
from coreinfer_edge.calibrate.native import calibrate
from coreinfer_edge.choose.strategies import STRATEGIES
from coreinfer_edge.errors import ArgumentError, UnsupportedModelError
from coreinfer_edge.model.header import read_header
from coreinfer_edge.run import session as run_session
from coreinfer_edge.run.core_llama import _OfLlama
from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.run.session import AUTO_TOKENS, auto_tokens

RandomModel = Callable[..., Path]

PROMPT = some_tokens(60)


@pytest.fixture(scope="module")
def model(random_model: RandomModel) -> Path:
    return random_model("llama", n_layer=6)


@pytest.fixture(scope="module")
def converted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with statistics from calibration."""
    path = tmp_path_factory.mktemp("converted") / "model.gguf"
    text = "The mill stood by the river, and nobody knew who had built it. " * 8
    with EdgeLLM(model, strategy="dense", n_ctx=64, n_threads=1) as llm:
        tokens = llm.llama.tokenize(text.encode(), add_bos=False)
        prior = calibrate(llm, read_header(model), [tokens], n_tokens=128, n_clusters=2)
    write_with_prior(read_header(model), prior, path)
    return path


def figures(llm: EdgeLLM) -> Any:
    """What the last run by tokens took."""
    return llm.llama.run


# --- density="auto" -------------------------------------------------------------------------------


@pytest.mark.parametrize("broken_off", [2, 3, 4])
def test_a_search_broken_off_leaves_nothing_that_the_next_call_goes_on_from(
    broken_off: int, random_model: RandomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coreinfer_edge.run.core_llama.LEAST_TOKENS", 16)
    model = random_model("llama", "q4_0", shape="small", n_layer=6)
    options: dict[str, Any] = {"density": "auto", "quality": 1.0, "warmup": 2}
    again = _OfLlama.again
    calls = 0

    def interrupted(backend: _OfLlama, n: int) -> Any:
        nonlocal calls
        calls += 1
        logits = again(backend, n)
        if calls == broken_off:
            raise KeyboardInterrupt
        return logits

    with (
        edge(model, **options) as llm,
        edge(model, **options) as fresh,
    ):
        end = llm.llama.tokenize(b"<|im_end|>", add_bos=False, special=True)
        prompt = [*some_tokens(30), *end, 5, 6, 7]
        with monkeypatch.context() as patched:
            patched.setattr(_OfLlama, "again", interrupted)
            with pytest.raises(KeyboardInterrupt):
                continued(llm, prompt, 12)
        assert continued(llm, prompt, 12) == continued(fresh, prompt, 12)
        assert figures(llm).estimated_kl == figures(fresh).estimated_kl


def test_the_better_the_quality_asked_for_the_higher_the_density(model: Path) -> None:
    chosen = []
    for quality in (1e-9, 0.05, 0.5, 5.0, 100.0):
        with edge(model, density="auto", quality=quality, warmup=0) as llm:
            continued(llm, PROMPT, 4)
            chosen.append(figures(llm).density)
            assert figures(llm).estimated_kl <= quality
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] == 1.0
    assert chosen[-1] == pytest.approx(0.2, abs=0.04)
    assert len(set(chosen)) >= 3


@pytest.mark.parametrize("n_prompt", [1, 2, 60])
@pytest.mark.parametrize("warmup", [0, 5])
def test_trying_densities_leaves_the_cache_as_dense_as_it_was(
    n_prompt: int, warmup: int, model: Path
) -> None:
    prompt = PROMPT[:n_prompt]
    with edge(model, strategy="dense") as llm:
        expected = continued(llm, prompt, 40)
    # so good that no density but 1 will do, after several were tried
    with edge(model, density="auto", quality=1e-9, warmup=warmup) as llm:
        assert continued(llm, prompt, 40) == expected
        assert figures(llm).density == 1.0


def test_after_the_trials_the_core_set_is_that_of_the_same_density_given(model: Path) -> None:
    with edge(model, density="auto", quality=3.0, warmup=8) as llm:
        tokens = continued(llm, PROMPT, 30)
        density = figures(llm).density
        sets = llm.llama.session.core_sets
        asked = llm.llama.session.density
    assert 0.2 < density < 1
    with edge(model, density=asked, warmup=8) as llm:
        assert continued(llm, PROMPT, 30) == tokens
        assert figures(llm).density == density
        assert figures(llm).estimated_kl is None
        for i, core in llm.llama.session.core_sets.items():
            np.testing.assert_array_equal(core.neurons, sets[i].neurons)


@pytest.mark.parametrize("options", [{"n_batch": 8}, {"n_ubatch": 4}, {"n_batch": 1}])
def test_batches_smaller_than_the_tokens_compared_work(
    options: dict[str, int], model: Path
) -> None:
    with edge(model, density="auto", quality=0.5, warmup=4, **options) as llm:
        assert len(continued(llm, PROMPT, 30)) == 30
        assert figures(llm).estimated_kl is not None


def test_a_second_turn_finds_a_density_of_its_own(model: Path) -> None:
    with edge(model, density="auto", quality=3.0, warmup=2) as llm:
        first = continued(llm, PROMPT, 10)
        kl = figures(llm).estimated_kl
        continued(llm, [*PROMPT, *first, *some_tokens(20)], 10)
        assert figures(llm).estimated_kl not in (None, kl)


def test_the_figures_of_generate_have_the_estimate(model: Path) -> None:
    with EdgeLLM(model, density="auto", quality=9.0, warmup=4, n_ctx=128, n_threads=1) as llm:
        llm.generate(PROMPT, max_tokens=30)
        assert llm.last is not None
        assert llm.last.estimated_kl is not None
        assert llm.last.density < 1
        assert "".join(llm.stream(PROMPT, max_tokens=30)) is not None
    with EdgeLLM(model, density=0.5, n_ctx=128, n_threads=1) as llm:
        llm.generate(PROMPT, max_tokens=30)
        assert llm.last is not None
        assert llm.last.estimated_kl is None


def test_the_tokens_compared_are_few_enough_to_leave_some_to_choose_from() -> None:
    assert [auto_tokens(n) for n in (1, 2, 3, 9, 96, 1000)] == [1, 1, 1, 3, 32, AUTO_TOKENS]


@pytest.mark.parametrize("options", [{"density": "auto"}, {"density": 0.5, "refresh": 4}])
def test_a_cache_that_cannot_take_tokens_back_is_an_error_that_says_what_to_do(
    options: dict[str, Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EdgeLLM(model, warmup=0, n_ctx=128, n_threads=1, **options) as llm:
        monkeypatch.setattr(llm.llama, "forget", lambda _start: False)
        with pytest.raises(UnsupportedModelError, match="give a density, and no refresh"):
            llm.generate(PROMPT, max_tokens=20)
        monkeypatch.undo()
        assert llm.generate(PROMPT, max_tokens=3) is not None


# --- refresh --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("refresh", "n_tokens", "expected"), [(1, 6, 4), (8, 42, 5), (100, 42, 0)])
def test_the_core_set_is_chosen_again_after_so_many_tokens(
    refresh: int, n_tokens: int, expected: int, model: Path
) -> None:
    with edge(model, refresh=refresh, warmup=0) as llm:
        assert len(continued(llm, PROMPT, n_tokens)) == n_tokens
        assert figures(llm).refreshes == expected
        assert figures(llm).density == pytest.approx(0.5, abs=0.03)


def test_a_refresh_weighs_the_answer_as_the_first_choice_does_its_warm_up(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_session, "REFRESH_GAIN", 0.0)
    with edge(model, refresh=12, warmup=0) as llm:
        tokens = continued(llm, PROMPT, 14)  # the last is the first after the refresh
        refreshed = llm.llama.session.core_sets
        assert figures(llm).refreshes == 1
        chooser = llm.llama.chooser
    assert chooser is not None
    with core_session(model) as session:
        session.core.collect(True, chooser.extra)
        session.run(PROMPT)
        of_prompt = session.core.statistics()
        session.core.clear_statistics()
        session.run(tokens[:12])
        of_answer = session.core.statistics()

    def differs(weight: float) -> bool:
        expected = chooser.choose(of_prompt.plus(of_answer, weight), 0.5)
        return any((expected[i].neurons != refreshed[i].neurons).any() for i in refreshed)

    assert not differs(run_session.WARMUP_WEIGHT)
    assert differs(1.0)
    assert differs(0.0)


def test_a_dense_model_has_nothing_to_refresh(model: Path) -> None:
    with edge(model, strategy="dense") as llm:
        expected = continued(llm, PROMPT, 20)
    with edge(model, density=1.0, refresh=2) as llm:
        assert continued(llm, PROMPT, 20) == expected
        assert figures(llm).refreshes == 0


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "dense"),
    [
        ([0, -1], {0, 5}),
        ((1,), {1}),
        (range(2), {0, 1}),
        ({np.int64(3): 1.0}, {3}),
        ([], set()),
    ],
)
def test_the_layers_named_stay_dense(
    layers: Iterable[int] | Mapping[int, float], dense: set[int], model: Path
) -> None:
    with edge(model, layers=layers, warmup=0) as llm:
        continued(llm, PROMPT, 4)
        assert set(range(6)) - set(llm.llama.session.core_sets) == dense
        assert figures(llm).density == pytest.approx(0.5, abs=0.05)


def test_a_layer_can_have_a_density_of_its_own(model: Path) -> None:
    with edge(model, layers={2: 0.2, -1: 1.0}, warmup=0) as llm:
        continued(llm, PROMPT, 4)
        # 0.2 of 160 is one block; what other layers were rounded by may make it two
        assert len(llm.llama.session.core_sets[2].neurons) in (32, 64)
        assert 5 not in llm.llama.session.core_sets


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layers": 3}, "layers is 3"),
        ({"layers": "0-5"}, "layers is '0-5'"),
        ({"layers": [0.5]}, "layers is"),
        ({"layers": {0: 1.5}}, "layer 0 the density 1.5"),
        ({"layers": {0: 0}}, "layer 0 the density 0"),
        ({"layers": {0: "all"}}, "layer 0 the density 'all'"),
        ({"layers": [6]}, "names layer 6"),
        ({"layers": [0, 1, 2], "density": 0.4}, "cannot be the mean"),
        ({"layers": {0: 0.5}, "density": "auto"}, "can only name layers that stay dense"),
        ({"quality": 0}, "quality is 0"),
        ({"quality": float("nan")}, "quality is nan"),
        ({"quality": "good"}, "quality is 'good'"),
        ({"refresh": 0}, "refresh is 0"),
        ({"refresh": 1.5}, "refresh is 1.5"),
        ({"refresh": True}, "refresh is True"),
        ({"density": "Auto"}, "density is 'Auto'"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], reason: str, model: Path) -> None:
    with pytest.raises(ArgumentError, match=reason):
        EdgeLLM(model, n_ctx=64, **options)


# --- strategies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_decodes_with_the_density_asked_for(strategy: str, converted: Path) -> None:
    with edge(converted, strategy=strategy, warmup=2) as llm:
        assert len(continued(llm, PROMPT, 10)) == 10
        assert figures(llm).density == pytest.approx(0.5, abs=0.05)
        assert figures(llm).core_tokens > 0


@pytest.mark.parametrize("strategy", ["static", "similarity"])
def test_a_strategy_that_needs_calibration_says_how_to_get_it(strategy: str, model: Path) -> None:
    with pytest.raises(ArgumentError, match=r"add it with coreinfer-edge convert"):
        EdgeLLM(model, strategy=strategy, n_ctx=64)


def test_the_prior_in_the_file_is_used_without_being_asked_for(
    model: Path, converted: Path
) -> None:
    chosen = []
    for path in (model, converted):
        with edge(path, warmup=0) as llm:
            continued(llm, PROMPT, 4)
            chosen.append(llm.llama.session.core_sets)
    assert any((chosen[0][i].neurons != chosen[1][i].neurons).any() for i in chosen[0])
