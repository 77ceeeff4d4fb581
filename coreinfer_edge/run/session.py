"""The core path in the order of the paper: pre-fill, warm up, choose, decode, refresh.

A session is one prompt and its answer. Whoever runs the model tells it what comes next, and gives
it a ``Backend`` to evaluate tokens with; nothing here knows llama.cpp.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from coreinfer_edge.choose.chooser import Chooser, density_of, keep_what_serves
from coreinfer_edge.choose.divergence import Divergence, smallest_density
from coreinfer_edge.choose.statistics import CoreSet, Extra, Ffn, Floats, Level, Statistics
from coreinfer_edge.choose.strategies import Scored

# Tokens that statistics should rest on, and the least and the most that warm-up adds to get there.
# SmolLM2, chat prompts of about 40 tokens: KL to dense 1.36 without warm-up, 0.90 after 64 tokens;
# even after 256 prompt tokens the first of the answer tell something new (0.77 and 0.75 after 32).
WARMUP_TARGET = 128
WARMUP_LEAST = 16
WARMUP_MOST = 64

# A token of the answer counts as this many of the prompt: it is more like what follows. SmolLM2,
# 24 chat prompts, 64 tokens of warm-up, KL with weights 8, 16, 32: 0.826, 0.797, 0.814.
WARMUP_WEIGHT = 16.0

# density="auto" compares dense and core on the last tokens before the choice: this many, but no
# more than this part of all, for the rest must tell which neurons matter.
AUTO_TOKENS = 32
AUTO_PART = 3

# How much less score a refresh must leave out of a layer for its core set to change.
REFRESH_GAIN = 0.05


def auto_tokens(n_tokens: int) -> int:
    """How many of the tokens so far ``density="auto"`` compares dense and core on."""
    return max(1, min(AUTO_TOKENS, n_tokens // AUTO_PART))


def auto_warmup(seen: float) -> int:
    """How many tokens ``warmup="auto"`` decodes dense, given the tokens in the statistics."""
    return max(WARMUP_LEAST, min(WARMUP_MOST, round(WARMUP_TARGET - seen)))


def all_neurons(ffns: Sequence[Ffn]) -> dict[int, CoreSet]:
    """Core sets of all neurons: those of FFNs that are not named are in memory too."""
    return {0: CoreSet(np.arange(ffns[0].n_ff, dtype=np.int32), None)}


@dataclass
class Run:
    """What one session does and takes; the source of its ``Figures``."""

    steered: bool = False  # whether it is to have a core set of its own
    set_once: bool = False  # whether it runs on levels that were set when the model was loaded
    prompt_tokens: int = 0
    completion_tokens: int = 0
    warmup_tokens: int = 0
    warmup_left: int = 0
    stopped: bool = False  # by ``stop_when``
    core_tokens: int = 0
    density: float = 1.0
    levels: tuple[Level, ...] = ()
    estimated_kl: float | None = None
    core_bytes: int = 0
    packed_bytes: int = 0
    refreshes: int = 0
    refresh_seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    prefill_seconds: float = 0.0
    choose_seconds: float = 0.0
    decode_seconds: float = 0.0
    core_seconds: float = 0.0
    core_faults: int = 0
    streamed_bytes: int = 0
    stream_seconds: float = 0.0
    stream_waited_seconds: float = 0.0
    peak_private: int = 0


class Settings(NamedTuple):
    """How a session chooses.

    Attributes:
        quality: the KL divergence in nats per token that the density ``"auto"`` keeps to.
        refresh: number of tokens after which the core set is chosen again, None for never.
        warmup: number of tokens of the answer to decode dense first, or ``"auto"``.
        most_density: the most that ``"auto"`` may choose.
        dear: whether dense evaluation fetches the weights of the FFNs from afar, each time.
        exact: whether the core set only drafts, see ``run/exact.py``.
    """

    quality: float
    refresh: int | None = None
    warmup: int | Literal["auto"] = "auto"
    most_density: float = 1.0
    dear: bool = False
    exact: bool = False


class Core(Protocol):
    """What a session needs of a ``CoreContext``, which describes it."""

    @property
    def core_bytes(self) -> int: ...
    @property
    def ffns(self) -> Sequence[Ffn]: ...
    def collect(self, on: bool, extra: Extra | None = None) -> None: ...
    def clear_statistics(self) -> None: ...
    def statistics(self) -> Statistics: ...
    def set_core(self, core: Mapping[int, CoreSet]) -> None: ...
    def use_core(self, on: bool) -> None: ...


Output_co = TypeVar("Output_co", covariant=True)  # what a backend gives for tokens of the answer
Output = TypeVar("Output")


class Backend(Protocol[Output_co]):
    """One sequence of tokens in the KV cache of one model, and its core path."""

    @property
    def core(self) -> Core:
        """The core path."""
        ...

    @property
    def n_tokens(self) -> int:
        """The number of tokens in the cache."""
        ...

    @property
    def most_again(self) -> int:
        """The most tokens that ``again`` takes."""
        ...

    def tokens_from(self, start: int) -> list[int]:
        """The tokens in the cache from position ``start`` on."""
        ...

    def dense(self, n_tokens: int) -> AbstractContextManager[None]:
        """Around a dense evaluation: weights that are not in memory are read for it."""
        ...

    def read(self, tokens: Sequence[int]) -> None:
        """Add tokens of the prompt, or tokens whose next ones are known."""
        ...

    def decode(self, tokens: Sequence[int]) -> Output_co:
        """Add tokens of the answer."""
        ...

    def take_back(self, n: int) -> None:
        """Take the last tokens out of the cache.

        Raises:
            UnsupportedModelError: the cache of this model cannot.
        """
        ...

    def again(self, n: int) -> Floats:
        """Evaluate the last tokens once more; the logits of each [n, n_vocab]. Raises likewise."""
        ...

    def restore(self, n: int) -> None:
        """After ``again``: let the cache hold what dense evaluation makes of the last tokens."""
        ...


class Decoder(Protocol[Output_co]):
    """Another way to decode the answer of a session."""

    def answer(self, tokens: Sequence[int]) -> Output_co:
        """Evaluate the next tokens of the answer."""
        ...

    def end(self) -> None:
        """The answer is over."""
        ...


class _Compared(NamedTuple):
    """The last tokens before the choice: dense logits [n, n_vocab], and their statistics."""

    logits: Floats
    statistics: Statistics


class Session(Generic[Output]):
    """Pre-fills one prompt, chooses a core set, and decodes the answer with it.

    ``begin``, ``prefill`` for each part of the prompt, then ``answer`` for each piece of the
    answer, which does what is due: ``warm_up``, ``choose``, ``decode``, ``refresh``. Each of those
    may be called by itself instead. ``end`` leaves the model dense.

    Sessions on one core context take turns: ``leave`` before another goes on.

    Args:
        backend: what evaluates the tokens.
        chooser: what chooses the core sets; None to stay dense, and collect nothing.
        density: fraction of the neurons to keep, averaged over the layers, or ``"auto"``.
        settings: how to choose.
        run: the figures to fill in.
        extra: what to collect of prompt and warm-up, where ``branch`` needs more than ``chooser``.

    Attributes:
        prefilled: whether a part of the prompt has been evaluated.
        of_prompt: statistics of the prompt so far. What was found in the cache may be set before.
        of_answer: statistics of the answer's tokens that were evaluated dense.
        density: the density in force.
        core_sets: those chosen, by index of the FFN; None before.
        core_from: position of the first token decoded with them.
        exact: decodes the answer instead of this session, with its core sets; None for no other.
    """

    def __init__(
        self,
        backend: Backend[Output],
        chooser: Chooser | None,
        density: float | Literal["auto"],
        settings: Settings,
        run: Run | None = None,
        extra: Extra | None = None,
    ) -> None:
        self.backend = backend
        self.run = run or Run()
        self.run.steered = chooser is not None
        self.prefilled = False
        self.of_prompt: Statistics | None = None
        self.of_answer: Statistics | None = None
        self.density = 1.0
        self.core_sets: Mapping[int, CoreSet] | None = None
        self.core_from = 0
        self.exact: Decoder[Output] | None = None
        self._chooser = chooser
        self._asked = density
        self._settings = settings
        self._extra = extra or (chooser.extra if chooser else Extra())
        self._collecting = False
        self._compared: _Compared | None = None
        self._in_force = False  # whether the core context has these core sets, and uses them

    @property
    def chooser(self) -> Chooser:
        """What chooses the core sets; there must be one."""
        assert self._chooser is not None
        return self._chooser

    # --- the prompt ---

    def begin(self) -> None:
        """Watch the neurons from now on."""
        if self.run.steered:
            core = self.backend.core
            core.clear_statistics()
            core.collect(True, self._extra)
            core.use_core(False)
            self._collecting = True

    def prefill(self, tokens: Sequence[int]) -> None:
        """Evaluate the prompt, or its next part, dense, and add up its statistics."""
        self.prefilled = True
        with self.backend.dense(len(tokens)):
            self.backend.read(tokens)
        if self.run.steered:
            of_part = self._collected()
            known = self.of_prompt
            self.of_prompt = of_part if known is None else known.plus(of_part, 1.0)
            self.run.warmup_left = self._warmup_tokens(float(self.of_prompt.n_tokens.max()))

    def _warmup_tokens(self, seen: float) -> int:
        """How many tokens to decode dense, given the number of tokens in the statistics."""
        warmup, dear = self._settings.warmup, self._settings.dear
        if warmup == "auto":
            # each token decoded dense would read all FFN weights
            if dear and seen >= 1:
                return 0
            # an exact answer goes on teaching the core set
            return WARMUP_LEAST if self._settings.exact else auto_warmup(seen)
        return warmup if seen >= 1 else max(1, warmup)

    # --- the answer ---

    def answer(self, tokens: Sequence[int]) -> Output:
        """Evaluate the next tokens of the answer as is due."""
        if self.exact is not None:
            return self.exact.answer(tokens)
        if not self.run.steered:
            with self.backend.dense(len(tokens)):
                return self.backend.decode(tokens)
        if self.run.warmup_left > 0:
            return self.warm_up(tokens)
        if self.core_sets is None:
            self.choose()
        elif self.until_refresh <= 0:
            self.refresh()
        return self.decode(tokens)

    def warm_up(self, tokens: Sequence[int]) -> Output:
        """Decode dense, to learn more of the answer."""
        self.run.warmup_left -= len(tokens)
        self.run.warmup_tokens += len(tokens)
        with self.backend.dense(len(tokens)):
            return self.backend.decode(tokens)

    def choose(self, estimate: bool = False) -> None:
        """Choose the density, if it is ``"auto"``, and the core sets from the statistics so far.

        Args:
            estimate: also estimate what a density that was given costs.
        """
        start = time.perf_counter()
        self.stop_collecting()
        if self._asked == "auto":
            self.density, self.run.estimated_kl = self._auto_density()
        else:
            self.density = self._asked
            if estimate:
                self.run.estimated_kl = self._estimate(self.density)
        if self._compared is not None:
            n = len(self._compared.logits)
            with self.backend.dense(n):
                self.backend.restore(n)
            self._compared = None
        self.take(self.chooser.choose(self._statistics(WARMUP_WEIGHT), self.density))
        self.run.choose_seconds += time.perf_counter() - start

    def take(self, core_sets: Mapping[int, CoreSet]) -> None:
        """Decode with these core sets from now on."""
        self.core_sets = core_sets
        if self._settings.dear and not core_sets:  # all neurons, but near
            self.core_sets = all_neurons(self.backend.core.ffns)
        self.core_from = self.backend.n_tokens
        self._in_force = False

    def decode(self, tokens: Sequence[int]) -> Output:
        """Evaluate tokens of the answer with the core sets."""
        if not self._in_force:
            start = time.perf_counter()
            self.gather()
            self.run.choose_seconds += time.perf_counter() - start
        return self.backend.decode(tokens)

    @property
    def until_refresh(self) -> int:
        """How many tokens the core sets are still good for."""
        if self._settings.refresh is None:
            return sys.maxsize
        return self._settings.refresh - (self.backend.n_tokens - self.core_from)

    def refresh(self) -> None:
        """Evaluate the tokens of the core sets dense, and choose again with what they add."""
        start = time.perf_counter()
        tokens = self.backend.tokens_from(self.core_from)
        self.backend.take_back(len(tokens))
        self.leave()
        self.collect()
        with self.backend.dense(len(tokens)):
            self.backend.read(tokens)
        self.choose_again()
        self.gather()
        self.run.refreshes += 1
        self.run.refresh_seconds += time.perf_counter() - start

    def choose_again(self) -> None:
        """Choose with what has been collected since the last choice."""
        self.stop_collecting()
        scored = self.chooser.scored(self._statistics(WARMUP_WEIGHT))
        wanted = self.chooser.core_sets(scored, self.density)
        self.take(keep_what_serves(self.core_sets or {}, wanted, scored, REFRESH_GAIN))

    def gather(self) -> None:
        """Let the model decode with the core sets; ``decode`` does so where it is needed."""
        assert self.core_sets is not None
        core = self.backend.core
        core.set_core(self.core_sets)
        if self.exact is None:
            core.use_core(True)
        self.run.density = density_of(self.core_sets, core.ffns)
        self.run.levels = self.chooser.levels
        self.run.core_bytes = core.core_bytes
        self._in_force = True

    def leave(self) -> None:
        """Let the model be dense for others; ``decode`` gathers the core sets again."""
        if self._in_force:
            self.backend.core.use_core(False)
            self._in_force = False

    def end(self) -> None:
        """Leave the model dense and unwatched, wherever the session stands."""
        if self.exact is not None:
            self.exact.end()
        if self.run.steered:
            self._collecting = self._in_force = False
            self.backend.core.collect(False)
            self.backend.core.use_core(False)

    # --- statistics ---

    def collect(self) -> None:
        """Watch the neurons of what is evaluated dense."""
        self.backend.core.collect(True, self.chooser.extra)
        self._collecting = True

    def _collected(self) -> Statistics:
        """The native sums, which begin anew."""
        statistics = self.backend.core.statistics()
        self.backend.core.clear_statistics()
        return statistics

    def stop_collecting(self) -> None:
        """Watch the neurons no more; what was collected since the prompt is of the answer."""
        if self._collecting:
            collected = self._collected()
            self.backend.core.collect(False)
            self._collecting = False
            known = self.of_answer
            self.of_answer = collected if known is None else known.plus(collected, 1.0)

    def _statistics(self, weight: float) -> Statistics:
        """Of the prompt, and ``weight`` times those of the answer's tokens evaluated dense."""
        assert self.of_prompt is not None
        assert self.of_answer is not None
        return self.of_prompt.plus(self.of_answer, weight)

    def branch(
        self, backend: Backend[Output], chooser: Chooser, density: float | Literal["auto"]
    ) -> Session[Output]:
        """A session that goes on after the same prompt and warm-up, with core sets of its own."""
        self.stop_collecting()
        other = Session(backend, chooser, density, self._settings)
        other.prefilled = self.prefilled
        other.of_prompt, other.of_answer = self.of_prompt, self.of_answer
        other._compared = self._compared
        return other

    # --- what a density would cost ---

    def compare(self) -> None:
        """Evaluate the last tokens once more, dense, for ``choose`` to compare core sets with."""
        self.stop_collecting()
        backend = self.backend
        n = min(auto_tokens(backend.n_tokens), backend.most_again)
        backend.core.collect(True, self._extra)
        with backend.dense(n):
            logits = backend.again(n)
        backend.core.collect(False)
        self._compared = _Compared(logits, self._collected())

    @cached_property
    def _without_compared(self) -> Scored:
        """Scores without the tokens compared on: what follows the choice is not known either."""
        assert self._compared is not None
        return self.chooser.scored(self._statistics(1.0).without(self._compared.statistics))

    def _estimate(self, density: float) -> float:
        """The KL divergence from dense to core of a density, on the last tokens so far."""
        if self._compared is None:
            self.compare()
        assert self._compared is not None
        core, logits = self.backend.core, self._compared.logits
        core.set_core(self.chooser.core_sets(self._without_compared, density))
        core.use_core(True)
        divergence = Divergence()
        divergence.add(logits, self.backend.again(len(logits)))
        core.use_core(False)
        return divergence.kl

    def _auto_density(self) -> tuple[float, float]:
        """The smallest density that keeps to the quality, and its estimate."""
        most = self._settings.most_density
        density, kl = smallest_density(
            lambda tried: np.inf if tried > most else self._estimate(tried),
            self._settings.quality,
            self.chooser.least_density,
        )
        return (density, kl) if density <= most else (most, self._estimate(most))
