"""Measuring quality: the figures are those of the core path, whatever way they are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from core_session import continued, edge
from numpy.typing import NDArray
from reference import Core, Fill, Reference, write_without_neurons
from test_reference import some_tokens

from coreinfer_edge._bundled.llama_cpp import GGML_TYPE_F32, Llama
from coreinfer_edge.binding.sequences import Sequences
from coreinfer_edge.choose.chooser import keep_what_serves, layer_densities, n_kept
from coreinfer_edge.choose.statistics import CoreSet, Statistics
from coreinfer_edge.choose.strategies import Scored
from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.measure import quality as evaluate
from coreinfer_edge.measure.quality import (
    LEAST_TOKENS,
    MAX_SETTINGS,
    Evaluation,
    Interval,
    Quality,
    Report,
    Sample,
    Setting,
    chat_samples,
    confidence,
    rank_correlation,
    text_samples,
)
from coreinfer_edge.model.header import read_header
from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.run.session import AUTO_TOKENS, REFRESH_GAIN, WARMUP_WEIGHT, auto_warmup

pytestmark = pytest.mark.slow

RandomModel = Callable[..., Path]
Logits = NDArray[np.floating[Any]]

N_LAYER, N_FF = 8, 320


@pytest.fixture
def model(random_model: RandomModel) -> Path:
    return random_model("llama", n_layer=N_LAYER, n_ff=N_FF)


@pytest.fixture
def dense(model: Path) -> Iterator[EdgeLLM]:
    with edge(model, strategy="dense") as llm:
        yield llm


def sample(n_prompt: int = 40, n_warmup: int = 0, n_continuation: int = 24) -> Sample:
    tokens = some_tokens(n_prompt + n_warmup + n_continuation + 1)
    start = n_prompt + n_warmup
    return Sample(tokens[:n_prompt], tokens[n_prompt:start], tokens[start:-1], tokens[start + 1 :])


class Decoded(NamedTuple):
    """What one call of ``_decode`` was given: where it began, and the core set at its end."""

    position: int
    core: dict[int, CoreSet]


class Watched(NamedTuple):
    report: Report
    decoded: list[Decoded]
    gathered: list[dict[int, CoreSet]]
    n_logits: list[int]
    part: int

    @property
    def quality(self) -> Quality:
        return self.report.qualities[0]


def measured(llm: EdgeLLM, settings: Sequence[Setting], *samples: Sample, **options: Any) -> Report:
    header = read_header(Path(llm.llama.model_path))
    with Evaluation(llm, header, settings, samples, **options) as evaluation:
        return evaluation.measure()


def watched(llm: EdgeLLM, settings: Sequence[Setting], *samples: Sample, **options: Any) -> Watched:
    """Measure, and keep what was gathered and how many logits were asked for."""
    header = read_header(Path(llm.llama.model_path))
    decoded: list[Decoded] = []
    gathered: list[dict[int, CoreSet]] = []
    n_logits: list[int] = []
    with Evaluation(llm, header, settings, samples, **options) as evaluation:
        decode = evaluation._decode
        logits, set_core = evaluation._sequences.logits, evaluation._sequences.core.set_core

        def decode_watched(trial: Any, *rest: Any) -> None:
            position = trial.sequence.n_tokens
            decode(trial, *rest)
            decoded.append(Decoded(position, trial.session.core_sets))

        def logits_watched(sequence: int, start: int, tokens: Sequence[int]) -> Any:
            n_logits.append(len(tokens))
            return logits(sequence, start, tokens)

        def set_core_watched(core: dict[int, CoreSet]) -> None:
            gathered.append(core)
            set_core(core)

        evaluation._decode = decode_watched  # type: ignore[method-assign]
        evaluation._sequences.logits = logits_watched  # type: ignore[method-assign]
        evaluation._sequences.core.set_core = set_core_watched  # type: ignore[assignment]
        return Watched(evaluation.measure(), decoded, gathered, n_logits, evaluation._part)


# --- figures, computed apart ----------------------------------------------------------------------


class Plain(NamedTuple):
    kl: float
    agreement: float
    perplexity_ratio: float


def compared(dense: Logits, core: Logits, following: Sequence[int]) -> Plain:
    """The figures by their definitions, in float64."""

    def log_probabilities(logits: Logits) -> NDArray[np.float64]:
        x = logits.astype(np.float64)
        x = x - x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    p, q = log_probabilities(dense), log_probabilities(core)
    rows = np.arange(len(p))
    nll = [-of_model[rows, following].mean() for of_model in (p, q)]
    return Plain(
        float((np.exp(p) * (p - q)).sum(axis=1).mean()),
        float((p.argmax(axis=1) == q.argmax(axis=1)).mean()),
        float(np.exp(nll[1]) / np.exp(nll[0])),
    )


def assert_figures(quality: Quality, expected: Plain) -> None:
    """Equal but for the rounding of F32 logits.

    llama.cpp's logits in F32 are off by about 1e-6 of their spread of 3 (test_reference.py), and
    so the mean of a log-probability by less than 1e-5. KL and ratio here are of order 1.
    """
    assert expected.kl > 0.05  # or there would be nothing to compare
    assert quality.kl.mean == pytest.approx(expected.kl, rel=1e-4)
    assert quality.agreement.mean == expected.agreement
    assert quality.perplexity_ratio.mean == pytest.approx(expected.perplexity_ratio, rel=1e-4)


# --- the core path --------------------------------------------------------------------------------


def assert_equal_to_dense(quality: Quality) -> None:
    assert quality.density == 1.0
    assert abs(quality.kl.mean) < 1e-6
    assert abs(quality.kl.high) < 1e-6
    assert quality.agreement == Interval(1, 1, 1)
    assert quality.perplexity_ratio.mean == pytest.approx(1, abs=1e-6)


def test_with_all_neurons_a_random_model_is_dense(dense: EdgeLLM) -> None:
    settings = [Setting("energy", 1.0), Setting("griffin", 1.0), Setting("stability", 1.0)]
    report = measured(dense, settings, sample(), sample(30, 4, 20), estimate=True)
    for quality, setting in zip(report.qualities, settings, strict=True):
        assert_equal_to_dense(quality)
        assert (quality.strategy, quality.density_asked) == setting[:2]
        assert (quality.n_samples, quality.n_tokens) == (2, 44)
        assert quality.estimated_kl == pytest.approx(0, abs=1e-6)


def test_with_all_neurons_smollm2_is_dense_and_with_half_of_them_it_is_not(smollm2: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    with EdgeLLM(smollm2, strategy="dense", n_ctx=256, n_threads=1, n_threads_batch=1) as llm:
        samples = text_samples(llm.llama, text, 2, 64, 0, 16)
        report = measured(llm, [Setting("energy", 1.0), Setting("energy", 0.5)], *samples)
    assert_equal_to_dense(report.qualities[0])
    half = report.qualities[1]
    assert half.density == pytest.approx(0.5, abs=0.01)
    assert 0.01 < half.kl.mean < 3
    assert half.agreement.mean < 1


@pytest.mark.parametrize("n_warmup", [0, 6])
def test_the_figures_are_those_of_a_model_that_was_written_without_the_other_neurons(
    n_warmup: int, model: Path, dense: EdgeLLM, tmp_path: Path
) -> None:
    """Pre-filled by the full model: the pruned one takes over its cache."""
    one = sample(40, n_warmup)
    result = watched(dense, [Setting("griffin", 0.5)], one)
    core = {i: core.neurons for i, core in result.decoded[-1].core.items()}
    assert len(core) == N_LAYER
    pruned = tmp_path / "pruned.gguf"
    write_without_neurons(model, pruned, core)

    context = one.prompt + one.warmup
    full, other = exact_llama(model), exact_llama(pruned)
    try:
        full.eval(context)
        other.load_state(full.save_state())
        logits = []
        for llama in (full, other):
            assert llama.n_tokens == len(context)
            llama.eval(one.continuation)
            logits.append(llama.scores[len(context) : llama.n_tokens].copy())
    finally:
        full.close()
        other.close()
    assert_figures(result.quality, compared(logits[0], logits[1], one.following))
    kept = np.mean([len(neurons) / N_FF for neurons in core.values()])
    assert result.quality.density == pytest.approx(kept)


def exact_llama(path: Path) -> Llama:
    return Llama(
        str(path),
        n_ctx=256,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        flash_attn=False,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )


def test_the_figures_with_fill_are_those_of_the_reference(model: Path, dense: EdgeLLM) -> None:
    one = sample(40, 6)
    result = watched(dense, [Setting("energy", 0.5)], one)
    chosen = result.decoded[-1].core
    assert sorted(chosen) == list(range(1, N_LAYER - 1))
    core: Core = {i: core.neurons for i, core in chosen.items()}
    fill: Fill = {i: core.fill for i, core in chosen.items() if core.fill is not None}
    assert len(fill) == len(core)
    reference, n = Reference(model), len(one.prompt) + len(one.warmup)
    tokens = [*one.prompt, *one.warmup, *one.continuation]
    logits = [
        reference.logits(tokens)[n:],
        reference.logits(tokens, core, fill, core_from=n)[n:],
    ]
    assert_figures(result.quality, compared(logits[0], logits[1], one.following))


def test_settings_and_samples_do_not_disturb_each_other(dense: EdgeLLM) -> None:
    settings = [Setting(of, d) for of in ("energy", "griffin") for d in (0.3, 0.6, 1.0, "auto")]
    samples = [sample(), sample(30, 5, 20)]
    together = measured(dense, settings, *samples, quality=2.0)
    for setting, quality in zip(settings, together.qualities, strict=True):
        alone = [measured(dense, [setting], one, quality=2.0).qualities[0] for one in samples]
        kl = [of_sample.kl.mean for of_sample in alone]
        assert quality.kl.mean == pytest.approx(np.mean(kl), rel=1e-3, abs=1e-6)
        assert quality.density == pytest.approx(np.mean([one.density for one in alone]))


def test_more_neurons_are_better(dense: EdgeLLM) -> None:
    settings = [Setting("griffin", density) for density in (0.2, 0.5, 0.8)]
    kl = [quality.kl.mean for quality in measured(dense, settings, sample(60)).qualities]
    assert kl == sorted(kl, reverse=True)
    assert kl[-1] > 0


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", [None, 7])
@pytest.mark.parametrize("at_once", [1, 10, 23])
def test_a_continuation_measured_in_parts_has_the_same_figures(
    at_once: int, refresh: int | None, dense: EdgeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [Setting("energy", 0.4), Setting("griffin", 0.6)]
    samples = [sample(40, 3, 24), sample(30, 0, 11)]
    whole = watched(dense, settings, *samples, refresh=refresh)
    assert whole.part == 24
    monkeypatch.setattr(evaluate, "LOGIT_BYTES", at_once * 4 * dense.llama.n_vocab() + 3)
    parts = watched(dense, settings, *samples, refresh=refresh)
    assert parts.part == at_once
    for one, other in zip(whole.report.qualities, parts.report.qualities, strict=True):
        # the batches are of other sizes, so F32 sums run in another order
        assert other.kl.mean == pytest.approx(one.kl.mean, rel=1e-3)
        assert other.agreement == one.agreement
        assert other.perplexity_ratio.mean == pytest.approx(one.perplexity_ratio.mean, rel=1e-3)
        assert other.density == one.density
        assert other.n_tokens == one.n_tokens


def test_no_more_logits_are_held_at_once_than_memory_is_set_aside_for(
    dense: EdgeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "LOGIT_BYTES", 50 * 4 * dense.llama.n_vocab())
    settings = [Setting("energy", 0.5), Setting("griffin", "auto")]
    result = watched(dense, settings, sample(90, 70, 120), estimate=True)
    assert result.part == 50
    assert max(result.n_logits) == 50
    # estimates take a few tokens of their own, whatever the bound
    monkeypatch.setattr(evaluate, "LOGIT_BYTES", 1)
    result = watched(dense, settings, sample(90, 70, 120), estimate=True)
    assert result.part == 1
    assert set(result.n_logits) == {1, AUTO_TOKENS}


def test_progress_is_told_once_for_each_setting_on_each_sample(
    dense: EdgeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "LOGIT_BYTES", 10 * 4 * dense.llama.n_vocab())
    header = read_header(Path(dense.llama.model_path))
    settings = [Setting("griffin", 0.5), Setting("griffin", 0.6), Setting("energy", 0.5)]
    done: list[int] = []
    with Evaluation(dense, header, settings, [sample(), sample(30)]) as evaluation:
        evaluation.measure(lambda: done.append(1))
    assert len(done) == 6


# --- refresh --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [100, 10], ids=["whole", "in parts"])
def test_refreshed_figures_are_those_of_the_reference_that_chooses_again(
    at_once: int, model: Path, dense: EdgeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: GRIFFIN's scores of all tokens so far, and a core set of its own for each part.

    The last layer stays dense, for only tokens with logits pass through all of it.
    """
    monkeypatch.setattr(evaluate, "LOGIT_BYTES", at_once * 4 * dense.llama.n_vocab())
    every, density = 8, 0.5
    one = sample(40, 0, 28)
    options: dict[str, Any] = {"layers": {-1: 1.0}, "refresh": every}
    result = watched(dense, [Setting("griffin", density)], one, **options)

    reference = Reference(model)
    tokens = [*one.prompt, *one.continuation]
    n_keep = n_kept([N_FF] * N_LAYER, layer_densities(N_LAYER, density, {N_LAYER - 1: 1.0}))
    core: dict[int, CoreSet] = {}
    rows = []
    n_changed = 0
    for start in range(len(one.prompt), len(tokens), every):
        scores = []
        for activation in reference.activations(tokens[:start]):
            norms = np.linalg.norm(activation, axis=1, keepdims=True)
            shares = (activation / norms) ** 2
            shares[len(one.prompt) :] *= WARMUP_WEIGHT  # they are of the answer
            scores.append(shares.sum(axis=0).astype(np.float32))
        wanted = {
            i: CoreSet(np.sort(np.argsort(-scores[i])[: n_keep[i]]).astype(np.int32), None)
            for i in range(N_LAYER - 1)
        }
        before = core
        core = keep_what_serves(core, wanted, Scored(scores, None), REFRESH_GAIN)
        if before:
            n_changed += any((core[i].neurons != before[i].neurons).any() for i in core)
        neurons: Core = {i: kept.neurons for i, kept in core.items()}
        end = start + every
        rows.append(reference.logits(tokens[:end], neurons, core_from=start)[start:end])
    logits = np.concatenate(rows)
    expected = compared(reference.logits(tokens)[len(one.prompt) :], logits, one.following)
    assert n_changed == 3  # each time
    assert_figures(result.quality, expected)
    assert result.quality.density == pytest.approx(sum(n_keep) / N_FF / N_LAYER)


def test_refresh_changes_the_core_set_but_not_the_density(dense: EdgeLLM) -> None:
    one = sample(20, 0, 40)
    settings = [Setting("energy", 0.5)]
    fixed = watched(dense, settings, one)
    refreshed = watched(dense, settings, one, refresh=10)
    assert len(fixed.gathered) == 1
    assert len(refreshed.gathered) == 4
    first, final = refreshed.gathered[0], refreshed.gathered[-1]
    assert sorted(first) == sorted(final)
    assert all(len(first[i].neurons) == len(final[i].neurons) for i in first)
    assert any((first[i].neurons != final[i].neurons).any() for i in first)
    assert refreshed.quality.density == fixed.quality.density
    assert np.isfinite(refreshed.quality.kl.mean)
    assert refreshed.quality.kl.mean != pytest.approx(fixed.quality.kl.mean, rel=1e-3)


def test_a_refresh_that_never_comes_changes_nothing(dense: EdgeLLM) -> None:
    settings = [Setting("energy", 0.5)]
    fixed = watched(dense, settings, sample())
    late = watched(dense, settings, sample(), refresh=1000)
    assert len(late.gathered) == 1
    assert late.report == fixed.report


# --- estimates and auto ---------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["energy", "griffin"])
@pytest.mark.parametrize("n_prompt", [4, 45, 150])
def test_estimates_are_those_that_density_auto_goes_by(
    n_prompt: int, strategy: str, model: Path, dense: EdgeLLM
) -> None:
    one = sample(n_prompt)
    with edge(model, strategy=strategy, density="auto", quality=2.0, warmup=0) as llm:
        llm.generate(one.prompt, max_tokens=4, temperature=0)
        assert llm.last is not None
        estimated, density = llm.last.estimated_kl, llm.last.density
    auto = measured(dense, [Setting(strategy, "auto")], one, quality=2.0).qualities[0]
    assert density < 1
    assert auto.density == density
    assert estimated is not None
    assert auto.estimated_kl == pytest.approx(estimated, rel=1e-3)
    assert auto.density_asked == "auto"
    settings = [Setting(strategy, tenths / 10) for tenths in range(2, 10)]
    report = measured(dense, settings, one, estimate=True)
    estimates = [quality.estimated_kl for quality in report.qualities]
    assert any(estimated == pytest.approx(each, rel=1e-3) for each in estimates)
    assert report.rank_correlation is not None


def test_without_estimates_there_are_none(dense: EdgeLLM) -> None:
    report = measured(dense, [Setting("energy", 0.5)], sample(), sample(30), sample(20))
    assert report.qualities[0].estimated_kl is None
    assert report.rank_correlation is None


def test_estimating_does_not_change_what_is_measured(dense: EdgeLLM) -> None:
    settings = [Setting("energy", 0.5), Setting("griffin", 0.4)]
    plain = measured(dense, settings, sample(90))
    estimated = measured(dense, settings, sample(90), estimate=True)
    for one, other in zip(plain.qualities, estimated.qualities, strict=True):
        assert other.kl == one.kl
        assert other.estimated_kl is not None


def test_estimates_rank_as_the_measured_divergences_do(dense: EdgeLLM) -> None:
    settings = [Setting("griffin", tenths / 10) for tenths in range(2, 10)]
    correlation = measured(dense, settings, sample(90), estimate=True).rank_correlation
    assert correlation is not None
    assert correlation > 0.8


# --- what cannot be measured ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ([], {}, "0 settings"),
        ([Setting("energy", 0.5)] * (MAX_SETTINGS + 1), {}, f"{MAX_SETTINGS + 1} settings"),
        ([Setting("static", 0.5)], {}, "needs the prior"),
        ([Setting("similarity", 0.5)], {}, "needs the clusters"),
        ([Setting("energy", 0.5)], {"layers": {N_LAYER: 1.0}}, f"layer {N_LAYER}"),
        ([Setting("energy", 0.2)], {"layers": {0: 1.0, 1: 1.0}}, "cannot be the mean"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused_before_the_measuring(
    settings: list[Setting], options: dict[str, Any], message: str, dense: EdgeLLM
) -> None:
    with pytest.raises(ArgumentError, match=message):
        measured(dense, settings, sample(), **options)


def test_as_many_settings_as_are_allowed_fit_into_one_context(dense: EdgeLLM) -> None:
    settings = [Setting("griffin", 0.5)] * MAX_SETTINGS
    report = measured(dense, settings, sample(8, 0, 4))
    assert len({quality.kl for quality in report.qualities}) == 1


# --- samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("n_warmup", [0, 5])
def test_windows_are_evenly_spaced_and_begin_as_the_model_has_texts_begin(
    n_warmup: int, add_bos: bool, random_model: RandomModel
) -> None:
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, 403)
    text = "".join(map(chr, letters))
    with edge(random_model("llama", add_bos=add_bos), strategy="dense") as llm:
        llama = llm.llama
        tokens = llama.tokenize(text.encode(), add_bos=False)
        samples = text_samples(llama, text, 5, 20, n_warmup, 12)
        bos = [llama.token_bos()] if add_bos else []
    length = 20 - len(bos) + n_warmup + 12 + 1
    expected = [round(i * (len(tokens) - length) / 4 - 0.4999) for i in range(5)]
    starts = []
    for one in samples:
        assert (len(one.prompt), len(one.warmup)) == (20, n_warmup)
        assert len(one.continuation) == len(one.following) == 12
        assert one.following[:-1] == one.continuation[1:]
        assert one.prompt[: len(bos)] == bos
        window = one.prompt[len(bos) :] + one.warmup + one.continuation + one.following[-1:]
        starts += [i for i in expected if tokens[i : i + length] == window][:1]
    assert starts == expected
    assert starts[0] == 0
    assert starts[-1] == len(tokens) - length


def test_a_text_of_one_window_is_enough_and_a_shorter_one_is_refused(dense: EdgeLLM) -> None:
    text = "b" * (20 - 1 + 12 + 1)
    samples = text_samples(dense.llama, text, 24, 20, 0, 12)
    assert len(samples) == 1
    # windows that overlap would make the interval too narrow
    assert len(text_samples(dense.llama, text + text[:-1], 24, 20, 0, 12)) == 1
    assert len(text_samples(dense.llama, text + text, 24, 20, 0, 12)) == 2
    with pytest.raises(ArgumentError, match="the text has 31 tokens, and one window needs 32"):
        text_samples(dense.llama, text[1:], 24, 20, 0, 12)


def chat_prompt(llm: EdgeLLM, text: str) -> list[int]:
    prompt = f"<|bos|><|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return llm.llama.tokenize(prompt.encode(), add_bos=False, special=True)


@pytest.mark.parametrize("n_warmup", [0, 5, "auto"])
def test_chat_samples_are_prompts_with_the_greedy_answers_of_the_dense_model(
    n_warmup: Any, model: Path, dense: EdgeLLM
) -> None:
    texts = ["the hat", "and then, in an inn"]
    done: list[int] = []
    samples = chat_samples(dense, n_warmup, 20, texts, lambda: done.append(1))
    assert len(samples) == len(done) == 2
    with edge(model, strategy="dense") as fresh:
        for text, one in zip(texts, samples, strict=True):
            prompt = chat_prompt(fresh, text)
            assert one.prompt == prompt
            assert len(one.warmup) == (auto_warmup(len(prompt)) if n_warmup == "auto" else n_warmup)
            answer = continued(fresh, prompt, len(one.warmup) + 21)
            assert one.warmup + one.continuation + one.following[-1:] == answer
            assert one.following[:-1] == one.continuation[1:]


def test_second_answers_follow_first_ones_that_were_decoded_with_a_core_set(
    model: Path, dense: EdgeLLM
) -> None:
    message = {"role": "user", "content": "the hat"}
    with edge(model, density=0.3, warmup=2) as first:
        (one,) = chat_samples(dense, 4, 20, ["the hat"], first=first)
        answer = first.chat([message], max_tokens=24, temperature=0.0)
        assert first.last is not None
        assert first.last.core_tokens_per_second > 0
    follow_up = {"role": "user", "content": evaluate.FOLLOW_UP}
    with edge(model, strategy="dense") as fresh:
        assert fresh.chat([message], max_tokens=24, temperature=0.0) != answer
        messages = [message, {"role": "assistant", "content": answer}, follow_up]
        fresh.chat(messages, max_tokens=26, temperature=0.0)
        tokens = fresh.llama.input_ids[: fresh.llama.n_tokens].tolist()
        assert len(one.prompt) == fresh.llama.run.prompt_tokens
    assert [*one.prompt, *one.warmup, *one.continuation] == tokens[: len(one.prompt) + 24]


def test_answers_that_end_too_early_are_left_out(
    dense: EdgeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = dense.chat
    n_warmup = 3
    # of so many generated tokens the last is not evaluated, and one more must follow the others
    enough = n_warmup + LEAST_TOKENS + 2
    lengths = {"first": enough - 1, "and": enough, "then": 1, "end": enough + 1}

    def ending(messages: Any, max_tokens: int, **options: Any) -> Any:
        return chat(messages, max_tokens=lengths[messages[0]["content"]], **options)

    monkeypatch.setattr(dense, "chat", ending)
    samples = chat_samples(dense, n_warmup, 50, list(lengths))
    assert [one.prompt for one in samples] == [chat_prompt(dense, t) for t in ("and", "end")]
    assert [len(one.continuation) for one in samples] == [LEAST_TOKENS, LEAST_TOKENS + 1]
    with pytest.raises(ArgumentError, match="answers none of the chat prompts"):
        chat_samples(dense, n_warmup, 50, ["first", "then"])


# --- figures --------------------------------------------------------------------------------------


def test_the_interval_holds_the_mean_and_is_the_same_every_time() -> None:
    values = np.random.default_rng(3).exponential(1, 40).tolist()
    interval = confidence(values)
    assert interval.mean == pytest.approx(np.mean(values))
    assert interval.low < interval.mean < interval.high
    assert interval == confidence(values)
    # that of the mean, by its standard error
    error = np.std(values) / np.sqrt(len(values))
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_the_interval_of_one_value_or_of_equal_ones_is_a_point() -> None:
    assert confidence([0.25]) == Interval(0.25, 0.25, 0.25)
    assert confidence([0.5] * 7) == Interval(0.5, 0.5, 0.5)


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Pearson's correlation of mid-ranks, written out."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [
            sum(other < value for other in values) + (values.count(value) + 1) / 2
            for value in values
        ]

    x, y = (ranks(list(side)) for side in zip(*pairs, strict=True))
    mean = (len(x) + 1) / 2
    product = sum((a - mean) * (b - mean) for a, b in zip(x, y, strict=True))
    squares = sum((a - mean) ** 2 for a in x) * sum((b - mean) ** 2 for b in y)
    return float(product / squares**0.5)


@pytest.mark.parametrize("n_values", [3, 5, 1000], ids=["many ties", "some ties", "no ties"])
def test_rank_correlation_is_spearmans(n_values: int) -> None:
    rng = np.random.default_rng(n_values)
    x = rng.integers(n_values, size=30) / 7
    pairs = [(float(a), float(b)) for a, b in zip(x, x**3 + rng.integers(3, size=30), strict=True)]
    assert rank_correlation(pairs) == pytest.approx(spearman(pairs))


def test_rank_correlation_of_what_rises_or_falls_together_is_one() -> None:
    assert rank_correlation([(1, 10), (2, 100), (3, 1e6)]) == pytest.approx(1)
    assert rank_correlation([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1)
    assert rank_correlation([(1, 3), (1, 2), (1, 1)]) == 0
    assert rank_correlation([(1, 3), (2, 3), (3, 3)]) == 0


# --- sequences ------------------------------------------------------------------------------------


def test_sequences_share_a_beginning_and_go_on_apart(model: Path, dense: EdgeLLM) -> None:
    tokens = some_tokens(30)
    reference = Reference(model).logits(tokens)
    sequences = Sequences(dense.llama, [model], n_ctx=256, n_sequences=3, n_logits=8)
    try:
        sequences.evaluate(0, 0, tokens[:20])
        sequences.copy(0, 1)
        sequences.copy(0, 2, 15)
        for number, start in ((1, 20), (2, 15), (0, 20)):
            logits = sequences.logits(number, start, tokens[start : start + 8])
            np.testing.assert_allclose(logits, reference[start : start + 8], atol=1e-3)
        sequences.remove(1, 22)
        logits = sequences.logits(1, 22, tokens[22:24])
        np.testing.assert_allclose(logits, reference[22:24], atol=1e-3)
        sequences.clear()
        logits = sequences.logits(0, 0, tokens[:4])
        np.testing.assert_allclose(logits, reference[:4], atol=1e-3)
    finally:
        sequences.close()


def test_a_prompt_in_several_batches_counts_in_the_last_layer_as_in_one(
    model: Path, dense: EdgeLLM
) -> None:
    tokens = some_tokens(30)
    seen: list[Statistics] = []
    for n_logits in (8, 64):
        sequences = Sequences(dense.llama, [model], n_ctx=256, n_sequences=1, n_logits=n_logits)
        try:
            sequences.core.collect(True)
            sequences.evaluate(0, 0, tokens)
            seen.append(sequences.core.statistics())
        finally:
            sequences.close()
    for statistics in seen:
        assert statistics.n_tokens.tolist() == [30.0] * (N_LAYER - 1) + [1.0]
    np.testing.assert_allclose(seen[0].sum_sq[-1], seen[1].sum_sq[-1], rtol=1e-3, atol=1e-6)
