"""The order of things in a session, with a backend that computes no model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from coreinfer_edge.choose.chooser import Chooser
from coreinfer_edge.choose.statistics import CoreSet, Extra, Ffn, Floats, Statistics
from coreinfer_edge.run.session import WARMUP_WEIGHT, Session, Settings, auto_warmup

N_FFN, N_FF, N_VOCAB = 4, 128, 8
FFNS = [Ffn(i, N_FF, 1000) for i in range(N_FFN)]
NORMS = [np.ones(N_FF, dtype=np.float32)] * N_FFN


class FakeCore:
    """Each token lets the neuron of its number be active, and nothing else."""

    def __init__(self, log: list[str]) -> None:
        self.ffns, self.core_bytes = FFNS, 77
        self.log = log
        self.sums = np.zeros(N_FF, dtype=np.float32)
        self.n = 0
        self.collecting = self.in_use = False
        self.gathered: Mapping[int, CoreSet] = {}

    def collect(self, on: bool, extra: Extra | None = None) -> None:
        self.collecting = on

    def clear_statistics(self) -> None:
        self.sums, self.n = np.zeros_like(self.sums), 0

    def statistics(self) -> Statistics:
        each = [self.sums.copy() for _ in FFNS]
        zeros = [np.zeros_like(self.sums) for _ in FFNS]
        return Statistics(zeros, each, each, zeros, np.full(N_FFN, self.n, dtype=np.float32))

    def set_core(self, core: Mapping[int, CoreSet]) -> None:
        self.gathered = dict(core)
        self.log.append("gather")

    def use_core(self, on: bool) -> None:
        self.in_use = on

    def see(self, tokens: Sequence[int]) -> None:
        if self.collecting:
            np.add.at(self.sums, list(tokens), 1)
            self.n += len(tokens)


class FakeBackend:
    """Writes down what it is asked for. The fewer neurons are kept, the farther the logits."""

    def __init__(self, core: FakeCore | None = None, tokens: Sequence[int] = ()) -> None:
        self.log: list[str] = core.log if core else []
        self.core = core or FakeCore(self.log)
        self.tokens = list(tokens)
        self.most_again = 32

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def tokens_from(self, start: int) -> list[int]:
        return self.tokens[start:]

    @contextmanager
    def dense(self, n_tokens: int) -> Iterator[None]:
        assert not self.core.in_use
        yield

    def read(self, tokens: Sequence[int]) -> None:
        self._add("read", tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._add("core" if self.core.in_use else "dense", tokens)

    def _add(self, how: str, tokens: Sequence[int]) -> str:
        self.log.append(f"{how} {len(tokens)}")
        self.core.see(tokens)
        self.tokens += tokens
        return how

    def take_back(self, n: int) -> None:
        del self.tokens[len(self.tokens) - n :]

    def again(self, n: int) -> Floats:
        self.log.append(f"again {n}")
        self.core.see(self.tokens[-n:])
        kept = self.core.gathered if self.core.in_use else {}
        missing = sum(N_FF - len(core.neurons) for core in kept.values()) / (N_FFN * N_FF)
        return np.tile(np.linspace(0, missing, N_VOCAB, dtype=np.float32), (n, 1))

    def restore(self, n: int) -> None:
        self.log.append(f"restore {n}")


def chooser() -> Chooser:
    return Chooser("griffin", FFNS, N_FFN, NORMS, None, None)


def session(
    density: Any = 0.25, backend: FakeBackend | None = None, quality: float = 0.25, **settings: Any
) -> tuple[Session[str], FakeBackend]:
    backend = backend or FakeBackend()
    settings = {"warmup": 0, **settings}
    return Session(backend, chooser(), density, Settings(quality, **settings)), backend


def prefilled(*arguments: Any, prompt: int = 40, **settings: Any) -> tuple[Session[str], Any]:
    one, backend = session(*arguments, **settings)
    one.begin()
    one.prefill([i % 8 for i in range(prompt)])
    return one, backend


def kept(one: Session[str]) -> set[int]:
    assert one.core_sets is not None
    return set(one.core_sets[0].neurons.tolist())


def test_prefill_warm_up_choose_decode_refresh_come_in_this_order() -> None:
    one, backend = prefilled(warmup=2, refresh=3)
    assert [one.answer([9]) for _ in range(7)] == ["dense"] * 2 + ["core"] * 5
    assert backend.log == [
        *("read 40", "dense 1", "dense 1", "gather", "core 1", "core 1", "core 1"),
        *("read 3", "gather", "core 1", "core 1"),
    ]
    assert (one.run.warmup_tokens, one.run.refreshes, one.run.core_bytes) == (2, 1, 77)
    assert one.run.density == 0.25
    one.end()
    assert not backend.core.in_use
    assert not backend.core.collecting


def test_without_a_chooser_nothing_is_collected_or_chosen() -> None:
    backend = FakeBackend()
    one = Session(backend, None, 1.0, Settings(0.25))
    one.begin()
    one.prefill([1, 2])
    assert {one.answer([3]) for _ in range(200)} == {"dense"}
    assert set(backend.log) == {"read 2", "dense 1"}
    assert one.core_sets is None
    assert not one.run.steered


def test_a_prompt_in_parts_has_the_statistics_of_one_in_a_whole() -> None:
    whole, _ = prefilled()
    parts, _ = session()
    parts.begin()
    for start in range(0, 40, 10):
        parts.prefill([i % 8 for i in range(start, start + 10)])
    assert whole.of_prompt is not None
    assert parts.of_prompt is not None
    np.testing.assert_array_equal(parts.of_prompt.sum_sq, whole.of_prompt.sum_sq)
    assert parts.of_prompt.n_tokens.tolist() == [40] * N_FFN


def test_what_was_found_in_the_cache_counts_as_if_it_had_been_evaluated() -> None:
    first, _ = prefilled()
    second, backend = session(backend=FakeBackend(tokens=range(40)))
    second.begin()
    second.of_prompt = first.of_prompt
    second.prefill([9] * 5)
    assert backend.log == ["read 5"]
    assert second.of_prompt is not None
    assert second.of_prompt.n_tokens.tolist() == [45] * N_FFN
    assert second.of_prompt.sum_sq[0][[0, 9]].tolist() == [5, 5]


@pytest.mark.parametrize(
    ("settings", "prompt", "expected"),
    [
        ({"warmup": 7}, 40, 7),
        ({"warmup": "auto"}, 40, auto_warmup(40)),
        ({"warmup": "auto"}, 1000, auto_warmup(1000)),
        ({"warmup": "auto", "dear": True}, 40, 0),
    ],
)
def test_warm_up_is_as_long_as_asked_for_or_as_the_prompt_needs(
    settings: dict[str, Any], prompt: int, expected: int
) -> None:
    one, _ = prefilled(prompt=prompt, **settings)
    decoded = [one.answer([3]) for _ in range(expected + 3)]
    assert decoded == ["dense"] * expected + ["core"] * 3


def test_tokens_of_the_answer_weigh_more_than_those_of_the_prompt() -> None:
    # each of neurons 0 to 31 once in the prompt, 32 to 47 once in the answer; 32 are kept
    one, _ = session()
    one.begin()
    one.prefill(list(range(32)))
    one.warm_up(list(range(32, 48)))
    one.choose()
    assert set(range(32, 48)) <= kept(one)
    assert one._statistics(WARMUP_WEIGHT).sum_sq[0][40] == WARMUP_WEIGHT


def test_a_refresh_learns_from_what_the_core_set_decoded() -> None:
    one, _ = prefilled(refresh=16)
    one.answer(list(range(100, 116)))
    assert not kept(one) & set(range(100, 116))
    one.answer([1])
    assert set(range(100, 116)) <= kept(one)


@pytest.mark.parametrize(("quality", "expected"), [(1e-9, 1.0), (100.0, 0.25)])
def test_auto_finds_a_density_and_leaves_the_cache_dense(quality: float, expected: float) -> None:
    one, backend = prefilled("auto", quality=quality)
    assert one.answer([1]) == "core"
    assert one.run.density == expected
    tokens = 40 // 3
    last = len(backend.log) - 1 - backend.log[::-1].index(f"again {tokens}")
    assert backend.log[last + 1 :] == [f"restore {tokens}", "gather", "core 1"]
    assert backend.log[1] == f"again {tokens}"  # dense, before any core set
    assert backend.tokens == [*(i % 8 for i in range(40)), 1]


def test_auto_does_not_choose_more_than_the_most() -> None:
    one, _ = prefilled("auto", quality=1e-9, most_density=0.5)
    one.answer([1])
    assert one.density == 0.5
    assert one.run.estimated_kl is not None
    assert one.run.estimated_kl > 1e-9


def test_a_density_that_was_given_is_estimated_only_when_asked_for() -> None:
    plain, backend = prefilled(0.5)
    plain.choose()
    assert plain.run.estimated_kl is None
    assert backend.log == ["read 40"]
    estimated, backend = prefilled(0.5)
    estimated.choose(estimate=True)
    assert estimated.run.estimated_kl is not None
    assert estimated.run.estimated_kl > 0
    assert backend.log[-1] == f"restore {40 // 3}"
    assert kept(estimated) == kept(plain)


def test_branches_share_prompt_and_comparison_and_take_turns() -> None:
    base, backend = prefilled("auto", warmup=2)
    base.warm_up([9, 9])
    base.compare()
    before = list(backend.log)
    branches = []
    for density in (0.25, 0.75):
        branch = base.branch(FakeBackend(backend.core, backend.tokens), chooser(), density)
        branch.choose(estimate=True)
        branches.append(branch)
    assert backend.log[: len(before)] == before
    assert "read 40" not in backend.log[len(before) :]
    for _ in range(2):
        for branch, n in zip(branches, (32, 96), strict=True):
            assert branch.decode([1]) == "core"
            assert len(backend.core.gathered[0].neurons) == n
            branch.leave()
    low, high = (branch.run.estimated_kl for branch in branches)
    assert low is not None
    assert high is not None
    assert low > high > 0


def test_with_all_neurons_streamed_weights_are_gathered_into_memory() -> None:
    one, backend = prefilled(1.0, dear=True)
    assert one.answer([1]) == "core"
    assert backend.core.gathered[0].neurons.tolist() == list(range(N_FF))
    assert one.run.density == 1.0
