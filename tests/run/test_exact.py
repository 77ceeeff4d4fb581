"""Exact decoding: the text of the whole model, whatever is drafted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coreinfer_edge import EdgeLLM
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.errors import ArgumentError, UnsupportedModelError
from coreinfer_edge.run.exact import MOST_DRAFTS, TRIED, Draft, Pace, WherePasses

RandomModel = Callable[..., Path]

PROMPT = "The history of Rome begins with"
QUESTION = {"role": "user", "content": "Name three fruits."}
THREADS = {"n_threads": 1, "n_threads_batch": 1}


def always_drafts(patch: pytest.MonkeyPatch) -> None:
    """Draft whether it pays or not, some tokens more or fewer each time."""
    lengths = itertools.cycle([1, 4, 2, 7, 0, 3])
    patch.setattr(Pace, "pays", True)
    patch.setattr(Pace, "may_pay", True)
    patch.setattr(Pace, "next_pays", lambda _, likely: next(lengths) > 0)
    patch.setattr(Pace, "verifying_pays", lambda _, likely: True)


@pytest.fixture(scope="module", autouse=True)
def _drafts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        always_drafts(patch)
        yield


@pytest.fixture(scope="module")
def dense(smollm2: Path) -> Iterator[EdgeLLM]:
    with EdgeLLM(smollm2, n_ctx=512, logits_all=True, **THREADS) as llm:
        yield llm


@pytest.fixture(scope="module")
def exact(smollm2: Path) -> Iterator[EdgeLLM]:
    with EdgeLLM(smollm2, exact=True, warmup=2, n_ctx=512, logits_all=True, **THREADS) as llm:
        yield llm


def drafted(llm: EdgeLLM) -> int:
    assert llm.last is not None
    assert 0 <= llm.last.accepted <= llm.last.drafted
    assert llm.last.passes > 0
    return llm.last.drafted


def falling_back(tokens: NDArray[np.intc], logits: NDArray[np.single]) -> NDArray[np.single]:
    """A processor that looks at all tokens so far."""
    result = logits.copy()
    result[tokens[-1]] = -np.inf
    result[len(tokens) % len(logits)] += 5
    return result


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 1.2, "seed": 2, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 0, "repeat_penalty": 1.3, "frequency_penalty": 0.5},
        {"seed": 3, "presence_penalty": 0.7, "typical_p": 0.9},
        {"seed": 4, "mirostat_mode": 1},
        {"seed": 5, "mirostat_mode": 2},
        {"temperature": 0, "logit_bias": {"260": -100.0, "281": 3.0}},
        {"seed": 6, "logits_processor": [falling_back]},
        {"seed": 7, "grammar": 'root ::= ([a-m ]{3,9} "; ")+'},
        {"temperature": 0, "stop": ["of the"]},
        {"seed": 8, "logprobs": 3, "max_tokens": 12},
    ],
    ids=str,
)
def test_an_exact_answer_is_that_of_the_whole_model(
    dense: EdgeLLM, exact: EdgeLLM, sampling: dict[str, Any]
) -> None:
    arguments = {"max_tokens": 32, **sampling}
    expected = dense.create_completion(PROMPT, **arguments)["choices"]
    assert exact.create_completion(PROMPT, **arguments)["choices"] == expected
    assert drafted(exact) > 0


def test_a_call_can_be_exact_and_tells_the_logits_of_each_token(
    dense: EdgeLLM, smollm2: Path
) -> None:
    told: dict[bool, list[tuple[int, NDArray[np.float32]]]] = {False: [], True: []}
    dense.generate(
        PROMPT,
        max_tokens=24,
        temperature=0,
        on_token=lambda token, logits: told[False].append((token, logits.copy())),
    )
    with EdgeLLM(smollm2, n_ctx=512, **THREADS) as llm:
        llm.generate(
            PROMPT,
            max_tokens=24,
            temperature=0,
            exact=True,
            on_token=lambda token, logits: told[True].append((token, logits.copy())),
        )
        assert drafted(llm) > 0
        with pytest.raises(ArgumentError, match="exact loses nothing"):
            llm.generate(PROMPT, exact=True, density="auto")
    assert len(told[True]) == 24
    for (token, logits), (expected, dense_logits) in zip(told[True], told[False], strict=True):
        assert token == expected
        np.testing.assert_array_equal(logits, dense_logits)


def test_a_call_of_an_exact_model_can_be_dense_and_goes_on_where_it_ended(smollm2: Path) -> None:
    with EdgeLLM(smollm2, exact=True, warmup=2, n_ctx=512, **THREADS) as llm:
        told = list(itertools.islice(llm.llama.generate([5, 6, 7], temp=0.0), 25))
        assert llm.llama.run.drafted > 0
        # without the last one told, which was not read yet
        assert llm.llama.input_ids[: llm.llama.n_tokens].tolist() == [5, 6, 7, *told[:-1]]
        whole = llm.generate(PROMPT, max_tokens=24, temperature=0)
        assert llm.generate(PROMPT, max_tokens=24, temperature=0, exact=False) == whole
        assert llm.last is not None
        assert (llm.last.strategy, llm.last.drafted) == ("dense", 0)
        with pytest.raises(ArgumentError, match="exact is 'no'"):
            llm.generate(PROMPT, exact="no")


def test_drafts_that_agree_make_passes_fewer(exact: EdgeLLM) -> None:
    exact.generate(PROMPT, max_tokens=64, temperature=0)
    assert exact.last is not None
    assert exact.last.accepted > 0
    assert exact.last.tokens_per_pass == 1 + exact.last.accepted / exact.last.passes
    assert exact.last.passes + exact.last.accepted >= exact.last.completion_tokens - 1
    assert exact.last.core_tokens == 0


def test_a_stream_and_a_chat_and_its_second_turn_are_those_of_the_whole_model(
    dense: EdgeLLM, exact: EdgeLLM
) -> None:
    texts = []
    for llm in (dense, exact):
        first = "".join(llm.stream(PROMPT, max_tokens=40, seed=1))
        turn = llm.chat([QUESTION], max_tokens=40, temperature=0)
        messages = [QUESTION, {"role": "assistant", "content": turn}, QUESTION]
        texts.append((first, turn, llm.chat(messages, max_tokens=40, seed=2)))
    assert texts[0] == texts[1]


def test_in_llama_cpps_own_layout_an_exact_answer_is_llama_cpps(smollm2: Path) -> None:
    texts = []
    for options in ({"strategy": "dense"}, {"exact": True, "repack": False}):
        with EdgeLLM(smollm2, n_ctx=512, **THREADS, **options) as llm:
            texts.append(llm.generate(PROMPT, max_tokens=48, seed=1))
    assert drafted(llm) > 0
    assert texts[0] == texts[1]


@pytest.mark.parametrize("arch", ["gemma3", "qwen3", "phi3", "gpt2"])
def test_other_architectures_are_exact_too(arch: str, random_model: RandomModel) -> None:
    path = random_model(arch, "q4_0", shape="small", n_ctx=512)
    texts = []
    for options in ({}, {"exact": True, "density": 0.9, "warmup": 1}):
        with EdgeLLM(path, **THREADS, **options) as llm:
            texts.append(llm.generate([1, 2, 3, 4], max_tokens=64, temperature=0))
    assert drafted(llm) > 0
    assert texts[0] == texts[1]


def test_with_memory_passes_stream_and_drafts_do_not(random_model: RandomModel) -> None:
    from test_memory import budget_for, wide_model

    path = wide_model(random_model, tied=True)
    options = {"density": 0.3, "n_ctx": 256, **THREADS}
    texts = []
    for others in ({"warmup": 1000}, {"exact": True}):
        with EdgeLLM(
            path, memory=budget_for(path, **options, **others), **options, **others
        ) as llm:
            assert llm.plan is not None
            assert llm.plan.streamed
            texts.append(llm.generate([1, 2, 3, 4], max_tokens=24, temperature=0))
            assert llm.last is not None
            assert llm.last.peak_private_bytes <= llm.plan.budget
    assert texts[0] == texts[1]
    assert drafted(llm) > 0
    # the prompt, and each pass; reading ahead adds some chunks
    passes = 1 + llm.last.passes
    assert passes <= llm.last.streamed_bytes / llm.last.full_ffn_bytes < passes + 3


def test_a_model_that_fits_whole_is_dense_and_does_not_stream(random_model: RandomModel) -> None:
    from test_memory import budget_for, wide_model

    path = wide_model(random_model, tied=True)
    options = {"n_ctx": 256, **THREADS}
    budget = budget_for(path, strategy="dense", **options) + (4 << 20)
    with EdgeLLM(path, memory=budget, exact=True, density=0.9, **options) as llm:
        assert llm.plan is not None
        assert not llm.plan.streamed
        llm.generate([1, 2, 3, 4], max_tokens=8, temperature=0)
        assert llm.last is not None
        assert (llm.last.strategy, llm.last.passes) == ("dense", 0)


def bits_after(llm: EdgeLLM, token: int) -> NDArray[np.float32]:
    """Logits after one more token than the cache is said to hold."""
    llama = llm.llama
    llama.forget(llama.n_tokens)
    return llama.logits_of([token], llama.n_tokens)


def test_an_answer_cut_short_leaves_the_cache_dense(
    dense: EdgeLLM, exact: EdgeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    ahead = type(exact.llama).ahead

    def interrupted(self: Any, *args: Any) -> Any:
        if next(calls) == 12:
            raise KeyboardInterrupt
        return ahead(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(type(exact.llama), "ahead", interrupted)
        with pytest.raises(KeyboardInterrupt):
            exact.generate(PROMPT, max_tokens=64, temperature=0)
    stream = exact.stream(PROMPT, max_tokens=64, temperature=0)
    assert next(stream)
    for _ in range(2):  # after the interrupt no more: a stream, let go of
        tokens = exact.llama.input_ids[: exact.llama.n_tokens].tolist()
        n_prompt = len(dense.llama.tokenize(PROMPT.encode()))
        dense.llama.reset()
        dense.llama.eval(tokens[:n_prompt])
        for token in tokens[n_prompt:]:
            dense.llama.eval([token])
        exact.llama.session.end()
        assert (bits_after(exact, 5) == bits_after(dense, 5)).all()
        stream.close()
    dense.llama.reset()
    texts = [llm.generate(PROMPT, max_tokens=32, temperature=0) for llm in (dense, exact)]
    assert texts[0] == texts[1]


def test_graphs_of_drafts_and_of_passes_are_kept_side_by_side(exact: EdgeLLM) -> None:
    llama = exact.llama
    exact.generate(PROMPT, max_tokens=8, temperature=0)
    core, start = llama.core, llama.n_tokens
    assert core is not None

    def flip() -> int:
        llama.forget(start)
        core.use_draft()
        llama.ahead([5], start)
        llama.forget(start)
        core.use_verify()
        llama.n_tokens = start
        llama.eval_each([5, 6])
        return int(llama_cpp.llama_perf_context(llama.ctx).n_reused)

    first = flip()
    assert [flip() - first for _ in range(3)] == [2, 4, 6]
    llama.reset()


def test_a_cache_that_cannot_be_taken_back_is_refused_when_loaded(
    random_model: RandomModel, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model("gemma3", "q4_0", shape="small")
    with pytest.raises(UnsupportedModelError, match="sliding window, and swa_full is False"):
        EdgeLLM(path, exact=True, swa_full=False)
    monkeypatch.setattr(llama_cpp, "llama_model_is_hybrid", lambda model: True)
    with pytest.raises(UnsupportedModelError, match="recurrent state"):
        EdgeLLM(smollm2, exact=True, n_ctx=64)


@pytest.mark.parametrize(
    "options",
    [
        {"density": "auto"},
        {"quality": 0.2},
        {"refresh": 32},
        {"exact": "yes"},
        {"draft_model": lambda tokens: tokens},
    ],
    ids=str,
)
def test_what_does_not_go_with_exact_is_refused(smollm2: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="exact"):
        EdgeLLM(smollm2, **{"exact": True, **options})


@pytest.mark.slow
def test_tokens_of_exact_sampling_have_the_dense_distribution(random_model: RandomModel) -> None:
    """Chi-square over 20,000 draws: triples of tokens, of which two follow drafts."""
    path = random_model("llama", "f32", shape="tiny", n_vocab=288)
    best, calls = 3, 6700
    sampling = {"top_k": best, "top_p": 1.0, "min_p": 0.0, "temperature": 1.5}
    prompt = [1, 2, 3]
    with EdgeLLM(path, exact=True, density=0.5, warmup=0, n_ctx=64, **THREADS) as llm:
        llama = llm.llama
        expected: dict[tuple[int, ...], float] = {(): 1.0}
        for _ in range(3):
            longer = {}
            for tokens, share in expected.items():
                llama.reset()
                llama.eval([*prompt, *tokens])
                logits = np.asarray(llama_cpp.llama_get_logits(llama.ctx)[: llama.n_vocab()])
                likeliest = np.argsort(logits)[-best:]
                weights = np.exp(logits[likeliest] / sampling["temperature"])
                for token, weight in zip(likeliest, weights / weights.sum(), strict=True):
                    longer[(*tokens, int(token))] = share * weight
            expected = longer
        counts = dict.fromkeys(expected, 0)
        n_accepted = 0
        for seed in range(calls):
            llama.set_seed(seed)
            steps = llama.generate(prompt, temp=1.5, top_k=best, top_p=1.0, min_p=0.0)
            counts[tuple(itertools.islice(steps, 3))] += 1
            steps.close()
            n_accepted += llama.run.accepted
    assert n_accepted > calls / 10
    shares = np.array([expected[tokens] for tokens in counts]) * calls
    chi_square = float(((np.array([*counts.values()]) - shares) ** 2 / shares).sum())
    # 26 degrees of freedom: above 54.05 once in a thousand times
    assert chi_square < 54.05


# --- how many to draft ----------------------------------------------------------------------------


@pytest.fixture
def as_measured() -> Iterator[None]:
    """Draft where it pays."""
    with pytest.MonkeyPatch.context() as patch:
        for name, own in _OWN.items():
            patch.setattr(Pace, name, own)
        yield


@pytest.fixture
def pace(as_measured: None) -> Callable[..., Pace]:
    """A pace that has measured passes and drafts of these times, and agreement."""

    def measured(draft: float, extra: float = 0.0, agreement: float = 0.8) -> Pace:
        result = Pace(0.5)
        for _ in range(40):
            result.passed(1, 1.0)
            result.passed(101, 1.0 + 100 * extra)
            result.drafted(draft)
        for i in range(400):
            agrees = int(i * agreement) != int((i + 1) * agreement)
            result.came_to([Draft(0, 0.7, False)], int(agrees), draft)
        return result

    return measured


_OWN = {name: vars(Pace)[name] for name in ("pays", "may_pay", "next_pays", "verifying_pays")}


def length(pace: Pace, probability: float = 0.7) -> int:
    likely = 1.0
    for n in range(MOST_DRAFTS):
        if not pace.next_pays(likely):
            return n
        likely *= pace.agreement_at(probability)
    return MOST_DRAFTS


def test_what_a_pass_gives_is_the_sum_of_a_geometric_series(pace: Callable[..., Pace]) -> None:
    free = pace(draft=1e-9, agreement=0.8)
    assert free.agreement == pytest.approx(0.8, abs=0.01)
    expected = (1 - free.agreement ** (MOST_DRAFTS + 1)) / (1 - free.agreement)
    assert free.gain() == pytest.approx(expected, rel=0.01)


def test_more_is_drafted_where_a_pass_is_dearer_and_where_drafts_agree(
    pace: Callable[..., Pace],
) -> None:
    lengths = [length(pace(draft=draft)) for draft in (0.5, 0.1, 0.01)]
    assert lengths == sorted(set(lengths))
    lengths = [length(pace(0.05, agreement=agreement)) for agreement in (0.4, 0.7, 0.95)]
    assert lengths == sorted(set(lengths))


def test_nothing_is_drafted_where_it_does_not_pay(pace: Callable[..., Pace]) -> None:
    assert not pace(draft=0.9, extra=0.2).pays
    assert not pace(draft=0.9, extra=0.2).may_pay
    assert pace(draft=0.1).pays
    lossy = pace(draft=0.3, extra=0.1, agreement=0.1)
    assert not lossy.pays


def test_in_memory_a_small_model_is_simply_dense(smollm2: Path, as_measured: None) -> None:
    with EdgeLLM(smollm2, exact=True, n_ctx=64, **THREADS) as llm:
        llm.generate(PROMPT, max_tokens=24, temperature=0)
        assert llm.last is not None
        assert (llm.last.strategy, llm.last.passes, llm.last.drafted) == ("dense", 0, 0)


def test_a_draft_ends_where_the_core_set_is_unsure(pace: Callable[..., Pace]) -> None:
    known = pace(draft=0.05, extra=0.05)
    for _ in range(200):
        known.came_to([Draft(0, 0.1, False)], 0, 0.05)
        known.came_to([Draft(0, 0.99, False)], 1, 0.05)
    assert known.verifying_pays(known.agreement_at(0.99))
    assert not known.verifying_pays(known.agreement_at(0.1))


@pytest.mark.parametrize(("here", "there"), [(0.06, 0.05), (0.05, 0.06)])
def test_passes_go_where_they_are_faster(here: float, there: float) -> None:
    where = WherePasses()
    for _ in range(2 * TRIED):
        on_gpu = where.on_gpu()
        first = where._passes[on_gpu] == 0
        where.passed(on_gpu, 4, 9.0 if first else there if on_gpu else here)
    assert where._passes == [TRIED, TRIED]
    assert where.on_gpu() == (there < here)
