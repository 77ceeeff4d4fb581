"""Measures quality: the distance of the core path from the dense model.

A sample is a prompt, a warm-up and a continuation. The prompt is pre-filled dense and the warm-up
decoded dense. The continuation is decoded teacher-forced, dense and with the core set of each
setting, and the distributions of the next token are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.binding.sequences import Sequences
from coreinfer_edge.choose.chooser import Chooser
from coreinfer_edge.choose.divergence import Divergence
from coreinfer_edge.choose.prior import from_header
from coreinfer_edge.choose.statistics import Extra, Floats, Level
from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.model.header import GGUFHeader
from coreinfer_edge.run.core_llama import CoreLlama
from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.run.one_sequence import OneSequence
from coreinfer_edge.run.session import AUTO_TOKENS, WARMUP_MOST, Session, Settings, auto_warmup

# Chat prompts that ask for long answers of many kinds.
CHAT_PROMPTS = (
    "Explain to a child why the sky is blue and sunsets are red.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "What are the main differences between a democracy and a monarchy?",
    "Give me a recipe for vegetable soup, step by step.",
    "How does a bicycle stay upright when it moves?",
    "Describe the water cycle and why it matters for farming.",
    "Write a letter to a friend who is moving to another city.",
    "What should I consider before I adopt a dog?",
    "Explain how a computer stores a photograph.",
    "Tell me about the history of the printing press and what it changed.",
    "Write a Python function that finds the largest number in a list, and explain it.",
    "Plan a three-day trip to the mountains for a family with small children.",
    "Translate into French: The library opens at nine and closes at six.",
    "A train travels 60 miles in 45 minutes. How fast is it in miles per hour? Show your steps.",
    "Summarise the plot of Romeo and Juliet in five sentences.",
    "Write a polite e-mail that asks for a refund for a broken lamp.",
    "List ten animals that live in the sea, with one fact about each.",
    "What is the difference between a virus and a bacterium?",
    "Write a SQL query that finds the three customers with the most orders, and explain it.",
    "Give arguments for and against working from home.",
    "Write a poem of four verses about the autumn wind.",
    "Explain how compound interest works, with an example.",
    "Who was Leonardo da Vinci?",
    "Write a dialogue between a doctor and a patient who cannot sleep.",
)

# Asked after the first answer of each, where second turns are measured.
FOLLOW_UP = "Tell me more about that, and give an example."

# A sample with a shorter continuation is left out.
LEAST_TOKENS = 16

LOGIT_BYTES = 64 * 1024**2  # the most bytes of logits held at once, for dense and core each

_PROMPT, _DENSE, _LAST, _FIRST_TRIAL = 0, 1, 2, 3
MAX_SETTINGS = 200  # bounded by the sequences of one context


# A strategy to compare with: all neurons of all layers at one level, as in a smaller file.
UNIFORM = "uniform"
ALMOST_ALL = 0.9999  # of the bytes: enough for all neurons at any lower level


class Setting(NamedTuple):
    """One way to decode that is measured; ``levels`` None is for all that there are here."""

    strategy: str
    density: float | Literal["auto"]
    levels: tuple[Level, ...] | None = None


class Sample(NamedTuple):
    """Tokens to measure on.

    Attributes:
        prompt: pre-filled dense.
        warmup: decoded dense.
        continuation: decoded dense and with each core set.
        following: the true next token after each token of the continuation.
    """

    prompt: list[int]
    warmup: list[int]
    continuation: list[int]
    following: list[int]


@dataclass(frozen=True)
class Interval:
    """A mean over samples with its 95 % confidence interval (bootstrap over the samples)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Quality:
    """The quality of one setting, compared with the dense model on the same tokens.

    Attributes:
        strategy, levels, density_asked: the setting, with the levels that there were.
        density: fraction of the FFN's bytes in use, or of its neurons where these are only kept or
            left out, averaged over layers and samples.
        kl: KL divergence from dense to core in nats per token.
        agreement: share of tokens with the same most likely next token.
        perplexity_ratio: perplexity of core divided by that of dense (geometric mean).
        estimated_kl: mean estimate of ``density="auto"``; None if not estimated.
        n_samples, n_tokens: number of samples, and of their tokens.
    """

    strategy: str
    levels: tuple[Level, ...]
    density_asked: float | Literal["auto"]
    density: float
    kl: Interval
    agreement: Interval
    perplexity_ratio: Interval
    estimated_kl: float | None
    n_samples: int
    n_tokens: int


@dataclass(frozen=True)
class Report:
    """The result of an evaluation.

    Attributes:
        qualities: one element for each setting.
        rank_correlation: Spearman's correlation of estimated and measured KL divergence over all
            samples and settings; None if not estimated.
    """

    qualities: list[Quality]
    rank_correlation: float | None


# --- samples --------------------------------------------------------------------------------------


def uniform(level: Level) -> Setting:
    """All neurons at this level, which is not full."""
    return Setting(UNIFORM, ALMOST_ALL, (level,))


def text_samples(
    llama: CoreLlama, text: str, n: int, n_prompt: int, n_warmup: int, n_continuation: int
) -> list[Sample]:
    """Windows evenly spaced over a text, fewer than ``n`` if they would overlap.

    Raises:
        ArgumentError: the text is shorter than one window.
    """
    tokens = llama.tokenize(text.encode(), add_bos=False, special=False)
    bos = [llama.token_bos()] if _adds_bos(llama) else []
    length = n_prompt - len(bos) + n_warmup + n_continuation + 1
    if len(tokens) < length:
        raise ArgumentError(
            f"the text has {len(tokens)} tokens, and one window needs {length}: give a longer text,"
            " or fewer tokens for prompt and continuation"
        )
    starts = np.linspace(0, len(tokens) - length, min(n, len(tokens) // length)).astype(int)
    return [
        _sample(bos + tokens[start : start + length], n_prompt, n_warmup)
        for start in dict.fromkeys(starts.tolist())
    ]


def chat_samples(
    llm: EdgeLLM,
    n_warmup: int | Literal["auto"],
    n_continuation: int,
    prompts: Sequence[str] = CHAT_PROMPTS,
    advance: Callable[[], None] = lambda: None,
    *,
    first: EdgeLLM | None = None,
) -> list[Sample]:
    """The greedy answers of a dense ``llm`` to chat prompts, without those that end too early.

    With ``first`` they are second answers: the model ``first``, which may have a core set, answers
    each prompt, and ``llm`` then answers FOLLOW_UP.
    """
    if n_continuation <= LEAST_TOKENS:
        raise ArgumentError(
            f"{n_continuation} tokens of answers are too few to measure on: give more than"
            f" {LEAST_TOKENS} (--tokens)"
        )
    samples = []
    for prompt in prompts:
        most = WARMUP_MOST if n_warmup == "auto" else n_warmup
        messages = [{"role": "user", "content": prompt}]
        if first is not None:
            answer = first.chat(messages, max_tokens=most + n_continuation, temperature=0.0)
            messages += [
                {"role": "assistant", "content": answer},
                {"role": "user", "content": FOLLOW_UP},
            ]
        llm.chat(
            messages,
            max_tokens=most + n_continuation + 2,
            temperature=0.0,
        )
        tokens = llm.llama.input_ids[: llm.llama.n_tokens].tolist()
        n_prompt = llm.llama.run.prompt_tokens
        warmup = auto_warmup(n_prompt) if n_warmup == "auto" else n_warmup
        tokens = tokens[: n_prompt + warmup + n_continuation + 1]
        if len(tokens) > n_prompt + warmup + LEAST_TOKENS:
            samples.append(_sample(tokens, n_prompt, warmup))
        advance()
    if not samples:
        raise ArgumentError(
            f"the model answers none of the chat prompts with more than {LEAST_TOKENS} tokens"
            " after warm-up: give --text, or a smaller --warmup"
        )
    return samples


def _adds_bos(llama: CoreLlama) -> bool:
    return bool(llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(llama.model)))


def _sample(tokens: list[int], n_prompt: int, n_warmup: int) -> Sample:
    start = n_prompt + n_warmup
    return Sample(tokens[:n_prompt], tokens[n_prompt:start], tokens[start:-1], tokens[start + 1 :])


# --- measuring ------------------------------------------------------------------------------------


@dataclass
class _Trial:
    """One setting on one sample."""

    setting: Setting
    session: Session[Floats]
    sequence: OneSequence
    divergence: Divergence = field(default_factory=Divergence)


class _Outcome(NamedTuple):
    """The figures of a trial, without its statistics and core sets, which would add up."""

    setting: Setting
    levels: tuple[Level, ...]
    kept: float
    estimated_kl: float | None
    divergence: Divergence


class Evaluation:
    """Measures settings on samples, in a second context of a loaded model.

    LOGIT_BYTES bounds the memory for any vocabulary and length. A continuation with more logits is
    measured in parts, and the core sets are gathered again for each part.

    Args:
        llm: the model, loaded with ``strategy="dense"``.
        header: the header of its file.
        settings: the settings to measure.
        samples: the samples to measure them on.
        layers, refresh, quality: as in ``EdgeLLM``.
        estimate: also estimate the KL divergence of every setting, as ``density="auto"`` does.
    """

    def __init__(
        self,
        llm: EdgeLLM,
        header: GGUFHeader,
        settings: Sequence[Setting],
        samples: Sequence[Sample],
        layers: Mapping[int, float] | None = None,
        refresh: int | None = None,
        quality: float = 0.25,
        estimate: bool = False,
    ) -> None:
        if not 0 < len(settings) <= MAX_SETTINGS:
            raise ArgumentError(f"{len(settings)} settings: give 1 to {MAX_SETTINGS}")
        llama = llm.llama
        self._settings = settings
        self._choice = Settings(quality, refresh)
        self._estimate = estimate
        self._samples = samples
        n_before = max(len(sample.prompt) + len(sample.warmup) for sample in samples)
        n_continuation = max(len(sample.continuation) for sample in samples)
        self._part = min(n_continuation, max(1, LOGIT_BYTES // (4 * llama.n_vocab())))
        at_once = 1 if self._part == n_continuation else 1 + len(settings)
        self._sequences = Sequences(
            llama,
            header.files,
            n_ctx=n_before + at_once * n_continuation + AUTO_TOKENS,
            n_sequences=_FIRST_TRIAL + len(settings),
            n_logits=max(self._part, AUTO_TOKENS),
            packed=llama.packed or any(setting.levels != ("full",) for setting in settings),
        )
        try:
            core = self._sequences.core
            prior = from_header(header)
            norms = core.down_norms() if prior is None else prior.down_norms
            n_layers = llama_cpp.llama_model_n_layer(llama.model)
            self._choosers = {
                (strategy, levels): Chooser(
                    # which chooses alike in all layers, and nothing where there are bytes for all
                    "griffin" if strategy == UNIFORM else strategy,
                    core.ffns,
                    n_layers,
                    norms,
                    prior,
                    None if strategy == UNIFORM else layers,
                    levels,
                )
                for strategy, _, levels in settings
            }
            for strategy, density, levels in settings:
                if density != "auto":
                    self._choosers[strategy, levels].densities(density)
        except BaseException:
            self.close()
            raise
        extras = [chooser.extra for chooser in self._choosers.values()]
        self._extra = Extra(
            any(extra.normalized for extra in extras), max(extra.top_share for extra in extras)
        )

    def close(self) -> None:
        """Free the context."""
        self._sequences.close()

    def __enter__(self) -> Evaluation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def measure(self, advance: Callable[[], None] = lambda: None) -> Report:
        """Measure all settings; ``advance`` is called once for each setting on each sample."""
        outcomes: list[list[_Outcome]] = [[] for _ in self._settings]
        for sample in self._samples:
            for of_setting, trial in zip(outcomes, self._on(sample, advance), strict=True):
                run = trial.session.run
                of_setting.append(
                    _Outcome(
                        trial.setting, run.levels, run.density, run.estimated_kl, trial.divergence
                    )
                )
        estimates = [
            (outcome.estimated_kl, outcome.divergence.kl)
            for of_setting in outcomes
            for outcome in of_setting
            if outcome.estimated_kl is not None
        ]
        return Report(
            [_quality(of_setting) for of_setting in outcomes],
            rank_correlation(estimates) if len(estimates) > 2 else None,
        )

    def _on(self, sample: Sample, advance: Callable[[], None]) -> list[_Trial]:
        """Measure all settings on one sample; they share its prompt and warm-up."""
        self._sequences.clear()
        prompt = OneSequence(self._sequences, _PROMPT, spare=_LAST)
        chooser = next(iter(self._choosers.values()))
        session = Session(prompt, chooser, "auto", self._choice, extra=self._extra)
        session.begin()
        session.prefill(sample.prompt)
        for part in _parts(sample.warmup, self._part):
            session.warm_up(part)
        if self._estimate or any(setting.density == "auto" for setting in self._settings):
            session.compare()
        trials = []
        for i, setting in enumerate(self._settings):
            sequence = prompt.copy(_FIRST_TRIAL + i)
            chooser = self._choosers[setting.strategy, setting.levels]
            trials.append(
                _Trial(setting, session.branch(sequence, chooser, setting.density), sequence)
            )
            trials[-1].session.choose(self._estimate)
        reference = prompt.copy(_DENSE)
        n = len(sample.continuation)
        for start in range(0, n, self._part):
            tokens = sample.continuation[start : start + self._part]
            following = np.array(sample.following[start : start + self._part], dtype=np.int32)
            dense = reference.decode(tokens)
            last = start + len(tokens) == n
            if last:
                reference.remove()
            for trial in trials:
                self._decode(trial, tokens, dense, following)
                if last:
                    trial.sequence.remove()
                    advance()
        return trials

    def _decode(
        self,
        trial: _Trial,
        tokens: list[int],
        dense: Floats,
        following: npt.NDArray[np.int32],
    ) -> None:
        """Decode some tokens of the continuation with the core set, and refresh it when due."""
        session = trial.session
        start = 0
        while start < len(tokens):
            if session.until_refresh <= 0:
                session.refresh()
            end = start + min(len(tokens) - start, session.until_refresh)
            logits = session.decode(tokens[start:end])
            trial.divergence.add(dense[start:end], logits, following[start:end])
            start = end
        session.leave()


def _parts(tokens: list[int], size: int) -> list[list[int]]:
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


# --- figures --------------------------------------------------------------------------------------


def _quality(outcomes: Sequence[_Outcome]) -> Quality:
    divergences = [outcome.divergence for outcome in outcomes]
    estimates = [outcome.estimated_kl for outcome in outcomes if outcome.estimated_kl is not None]
    ratio = confidence([float(np.log(d.perplexity_ratio)) for d in divergences])
    return Quality(
        strategy=outcomes[0].setting.strategy,
        levels=outcomes[0].levels,
        density_asked=outcomes[0].setting.density,
        density=float(np.mean([outcome.kept for outcome in outcomes])),
        kl=confidence([d.kl for d in divergences]),
        agreement=confidence([d.agreement for d in divergences]),
        perplexity_ratio=Interval(*(float(np.exp(x)) for x in (ratio.mean, ratio.low, ratio.high))),
        estimated_kl=float(np.mean(estimates)) if estimates else None,
        n_samples=len(outcomes),
        n_tokens=sum(d.n_tokens for d in divergences),
    )


def confidence(values: Sequence[float]) -> Interval:
    """The mean, with the 95 % interval of 2,000 bootstrap resamples (always the same ones)."""
    array = np.array(values)
    resampled = np.random.default_rng(0).choice(array, (2000, len(array))).mean(axis=1)
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Interval(float(array.mean()), float(low), float(high))


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's rank correlation, in -1 .. 1; 0 if one side has only equal values."""
    ranks = []
    for values in zip(*pairs, strict=True):
        _, index, counts = np.unique(np.array(values), return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        ranks.append((ends - (counts - 1) / 2)[index])  # equal values get their mean rank
    if any(np.ptp(of_side) == 0 for of_side in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
