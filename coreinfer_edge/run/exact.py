"""Exact decoding: the core set drafts tokens, one dense pass verifies them, what agrees is kept.

Speculative decoding (Leviathan et al., arXiv 2211.17192) with the model's own core set as the
draft. Each token is drawn from the dense model's logits by the call's own sampler, which has its
seed, grammar and penalties; a draft is kept if it is that token. So the text is the dense model's
for every seed, and not only of the same distribution, as accepting with probability p/q would give.
The draft is drawn by a copy of the sampler: with the same random number from a distribution almost
the same, it is mostly the same token.

The cache holds what a pass computed, never what drafting did. A pass computes each token as if it
were alone (``patches/0013``), so that no rounding tells it from decoding token by token.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from coreinfer_edge.run.session import Backend, Run, Session

if TYPE_CHECKING:
    from collections.abc import Iterator

# The most tokens drafted for one pass. Each needs room for logits.
MOST_DRAFTS = 15

# Rounds of llama.cpp's attention over keys: a pass that ends in the round in which it begins sees
# as many of them as each of its tokens would alone.
ROUND = 256

# Agreement to begin with, worth so many drafts; and how much faster drafting must promise to be
# before a core set is chosen for it, and before a pass.
FIRST_AGREEMENT, FIRST_WEIGHT = 0.9, 6.0
WORTH_CHOOSING, WORTH_DRAFTING = 1.05, 1.02

# What a further token of a pass costs to begin with, in passes over one token, and how many such
# tokens that is worth.
FIRST_EXTRA, FIRST_TOKENS = 0.12, 8

# Drafting may have cost this part of the time so far; if it does not promise to pay, this part for
# trying whether it does now. Earlier passes count for less.
MOST_LOST, LOST_TRYING, MEMORY = 0.03, 0.005, 0.995

# The core set follows the text after this many passes' tokens, if that takes this part of the time.
LEAST_NEW, FOLLOWING_PART = 32, 0.03

# Passes with the FFN on the processor and on the GPU before the faster is known.
TRIED = 3

# Drafts are told apart by the probability that the core set gives them, up to each of these.
_SURE = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 1.0)


class Draft(NamedTuple):
    """A token drawn with the core set, and the probability that it gives the likeliest token."""

    token: int
    probability: float
    ends: bool  # no token can follow


Output_co = TypeVar("Output_co", covariant=True)
Output = TypeVar("Output")


class DraftingBackend(Backend[Output_co], Protocol[Output_co]):
    """A ``Backend`` that can draft, and verify."""

    @property
    def most_verified(self) -> int:
        """The most tokens that ``verify`` takes now."""
        ...

    def drafts(self, tokens: Sequence[int]) -> Iterator[Draft]:
        """Draft after these tokens, one at a time, until closed; the cache then is as before."""
        ...

    def verify(self, tokens: Sequence[int], alone: bool) -> Output_co:
        """Add tokens, dense; what is drawn later tells which of them remain.

        Args:
            tokens: at most ``most_verified``, if alone.
            alone: each is computed as if it were the only one.
        """
        ...

    def stop_reading(self) -> None:
        """Read no weights ahead for the next pass; passes go on doing so by themselves."""
        ...


class Pace:
    """What drafting costs and gives with one model, as measured so far.

    Times are in seconds. Those of the last tokens count, and where it goes their median, which
    other programs disturb least.

    Args:
        draft_part: what drafting a token costs before it is measured, in passes over one token.
    """

    def __init__(self, draft_part: float) -> None:
        self._draft_part = draft_part
        self._single: deque[float] = deque(maxlen=31)
        self._several: deque[float] = deque(maxlen=31)
        self._extra: deque[tuple[int, float]] = deque(maxlen=31)
        self._draft: deque[float] = deque(maxlen=31)
        self._tested = [FIRST_WEIGHT / 3] * len(_SURE)
        self._agreed = [FIRST_WEIGHT / 3 * (FIRST_AGREEMENT + p) / 2 for p in _SURE]
        self._all, self._right = FIRST_WEIGHT, FIRST_WEIGHT * FIRST_AGREEMENT
        self._lost = self._time = 0.0

    # --- measuring ---

    def passed(self, n_tokens: int, seconds: float) -> None:
        """A pass over so many tokens took so long."""
        if n_tokens == 1:
            self._single.append(seconds)
        elif self._single:
            self._several.append(seconds)
            # a pass that something else held up is not dearer than its tokens one by one
            seconds = min(seconds, n_tokens * self.single)
            self._extra.append((n_tokens - 1, seconds - self.single))

    def drafted(self, seconds: float) -> None:
        """Drafting a token took so long."""
        self._draft.append(seconds)

    def came_to(self, drafts: Sequence[Draft], n_agreed: int, drafting: float) -> None:
        """So many of the drafts agreed; drafting took so long, without the pass."""
        for i, draft in enumerate(drafts[: n_agreed + 1]):
            sure, agreed = self._sure(draft.probability), float(i < n_agreed)
            self._tested[sure] = self._tested[sure] * MEMORY + 1
            self._agreed[sure] = self._agreed[sure] * MEMORY + agreed
            self._all = self._all * MEMORY + 1
            self._right = self._right * MEMORY + agreed
        # By what a token takes as a rule: a pass that something else held up is no loss.
        cost = drafting + len(drafts) * self.extra
        self._lost = self._lost * MEMORY + cost - n_agreed * self.single
        self._time = self._time * MEMORY + cost + self.single

    # --- deciding ---

    @property
    def single(self) -> float:
        """A pass over one token; 1 before any. One over several has taken no less."""
        if not self._single:
            return 1.0
        known = statistics.median(self._single)
        return min(known, statistics.median(self._several)) if self._several else known

    @property
    def has_measured(self) -> bool:
        """Whether there was a pass over one token."""
        return bool(self._single)

    @property
    def extra(self) -> float:
        """A further token of a pass."""
        n, seconds = FIRST_TOKENS, FIRST_TOKENS * FIRST_EXTRA * self.single
        for n_tokens, more in self._extra:
            n, seconds = n + n_tokens, seconds + more
        return max(0.0, seconds / n)

    @property
    def draft(self) -> float:
        """Drafting a token."""
        return statistics.median(self._draft) if self._draft else self._draft_part * self.single

    @property
    def agreement(self) -> float:
        """The share of drafts that the dense model draws too."""
        return self._right / self._all

    def agreement_at(self, probability: float) -> float:
        """The same, of drafts of this probability."""
        sure = self._sure(probability)
        return self._agreed[sure] / self._tested[sure]

    @staticmethod
    def _sure(probability: float) -> int:
        return next(i for i, most in enumerate(_SURE) if probability <= most or i == len(_SURE) - 1)

    def gain(self, agreement: float | None = None) -> float:
        """How many times as fast as dense drafting is to be, at its best length."""
        likely = self.agreement if agreement is None else agreement
        terms = (likely**k for k in range(1, MOST_DRAFTS + 1))
        return max(
            (1 + n) * self.single / (self.single + k * (self.draft + self.extra))
            for k, n in enumerate(itertools.accumulate(terms), 1)
        )

    @property
    def pays(self) -> bool:
        """Whether to draft for the next pass."""
        if self.gain() < WORTH_DRAFTING:
            return self.may_pay and self._lost <= LOST_TRYING * self._time
        return self._lost <= MOST_LOST * self._time

    @property
    def may_pay(self) -> bool:
        """Whether drafting could pay if the core set agreed well."""
        return self.gain(max(self.agreement, FIRST_AGREEMENT)) >= WORTH_CHOOSING

    def next_pays(self, likely: float) -> bool:
        """Whether to draft one more, where all so far are right with this probability."""
        rate = max(1.0, self.gain()) / self.single
        return likely * self.agreement > rate * (self.draft + self.extra)

    def verifying_pays(self, likely: float) -> bool:
        """Whether a draft that is right with this probability is worth its place in the pass."""
        return likely > self.extra * max(1.0, self.gain()) / self.single


class WherePasses:
    """Where passes over several tokens are faster, if the FFN weights lie in main memory.

    Either the processor multiplies with them there, or they are sent to the GPU. That depends on
    the bus and the processor: each is tried a few times.
    """

    def __init__(self) -> None:
        # tokens and seconds, by whether the GPU computed; and the passes
        self._tokens, self._seconds, self._passes = [0, 0], [0.0, 0.0], [0, 0]

    def on_gpu(self) -> bool:
        """Where the next pass is to be."""
        if min(self._passes) < TRIED:
            return self._passes[True] <= self._passes[False]
        here, there = (s / n for s, n in zip(self._seconds, self._tokens, strict=True))
        return there < here

    def passed(self, on_gpu: bool, n_tokens: int, seconds: float) -> None:
        """A pass over so many tokens took so long."""
        self._passes[on_gpu] += 1
        if self._passes[on_gpu] > 1:  # the first makes graphs and buffers
            self._tokens[on_gpu] += n_tokens
            self._seconds[on_gpu] += seconds


class Exact(Generic[Output]):
    """Decodes the answer of one session exactly.

    Args:
        session: after the prompt; it chooses the core sets, and has the statistics.
        backend: that of the session.
        pace: of this model; it learns from all sessions.
    """

    def __init__(
        self, session: Session[Output], backend: DraftingBackend[Output], pace: Pace
    ) -> None:
        self._session, self._backend, self._pace = session, backend, pace
        self._drafts: list[Draft] = []  # of the last pass
        self._kept_from = 0  # position at which they begin
        self._drafting = self._seconds = 0.0  # what they took, and what they took with the pass
        self._told = 0  # tokens of the answer before that pass
        self._new = 0  # tokens since the choice,
        self._new_seconds = 0.0  # the time for them,
        self._choice_seconds = 0.0  # and what the choice took
        self._patience = 1
        self._before: tuple[int, int] | None = None  # agreed and tested with the last core set
        self._agreed = self._tested = 0

    @property
    def run(self) -> Run:
        """The figures to fill in."""
        return self._session.run

    def answer(self, tokens: Sequence[int]) -> Output:
        """Evaluate the next tokens of the answer, and drafts after them."""
        self._settle()
        if len(tokens) > 1:  # some are told by whoever reads the answer: a batch without drafts too
            return self._backend.verify(tokens, alone=False)
        ready = self._ready()
        start = time.perf_counter()
        drafts = self._draft(tokens) if ready else []
        passed = time.perf_counter()
        output = self._backend.verify([*tokens, *(draft.token for draft in drafts)], alone=True)
        end = time.perf_counter()
        self._pace.passed(len(tokens) + len(drafts), end - passed)
        self._drafts, self._kept_from = drafts, self._backend.n_tokens - len(drafts)
        self._drafting, self._seconds = passed - start, end - start
        self._told = self.run.completion_tokens
        self.run.passes += 1
        self.run.drafted += len(drafts)
        return output

    def end(self) -> None:
        """The answer is over: of the last drafts those count that it came to."""
        if self._seconds > 0.0:
            taken = self.run.completion_tokens - self._told
            self.run.accepted += min(len(self._drafts), max(0, taken - 1))
            self._seconds = 0.0

    def _settle(self) -> None:
        """Learn what became of the last drafts: others than agreed are gone from the cache."""
        if self._seconds == 0.0:
            return
        n_agreed = max(0, self._backend.n_tokens - self._kept_from)
        self._pace.came_to(self._drafts, n_agreed, self._drafting)
        self.run.accepted += n_agreed
        self._agreed += n_agreed
        self._tested += min(len(self._drafts), n_agreed + 1)
        self._new += n_agreed + 1
        self._new_seconds += self._seconds
        self._seconds = 0.0

    def _ready(self) -> bool:
        """Whether to draft; there is a core set then."""
        session, run = self._session, self.run
        if run.warmup_left > 0 or not self._pace.has_measured:
            run.warmup_left -= 1
            run.warmup_tokens += 1
            return False
        if session.core_sets is None:
            if not self._pace.may_pay:
                session.stop_collecting()  # it never will: learn no more
                return False
            self._choose()
        elif self._following_pays():
            self._follow()
        return self._pace.pays

    def _choose(self) -> None:
        start, known = time.perf_counter(), self.run.choose_seconds
        self._backend.stop_reading()
        self._session.choose()
        self._session.gather()
        seconds = time.perf_counter() - start
        self.run.choose_seconds = known + seconds
        self._chosen(seconds)

    def _following_pays(self) -> bool:
        return (
            self._new >= LEAST_NEW * self._patience
            and self._choice_seconds <= FOLLOWING_PART * self._new_seconds
        )

    def _follow(self) -> None:
        """Choose anew, with what the passes have told of the text."""
        start = time.perf_counter()
        if self._before is not None and self._tested:
            agreed, tested = self._before
            if self._agreed / self._tested <= agreed / max(1, tested):
                self._patience *= 2  # the last time was for nothing
        self._before = (self._agreed, self._tested)
        self._backend.stop_reading()
        self._session.choose_again()
        self._session.gather()
        seconds = time.perf_counter() - start
        self.run.refreshes += 1
        self.run.refresh_seconds += seconds
        self._chosen(seconds)

    def _chosen(self, seconds: float) -> None:
        self._session.collect()  # the passes tell of the text
        self._choice_seconds = seconds
        self._new, self._new_seconds = 0, 0.0
        self._agreed = self._tested = 0

    def _draft(self, tokens: Sequence[int]) -> list[Draft]:
        pace = self._pace
        most = min(MOST_DRAFTS, self._backend.most_verified - len(tokens))
        drafts: list[Draft] = []
        likely = 1.0
        if most < 1 or not pace.next_pays(likely):
            return drafts
        source = self._backend.drafts(tokens)
        try:
            start = time.perf_counter()
            for draft in source:
                now = time.perf_counter()
                pace.drafted(now - start)
                start = now
                likely *= pace.agreement_at(draft.probability)
                if not pace.verifying_pays(likely):
                    break
                drafts.append(draft)
                if draft.ends or len(drafts) == most or not pace.next_pays(likely):
                    break
        finally:
            source.close()  # type: ignore[attr-defined]
        return drafts
