"""Measures speed: dense, core sets and other engines take turns (A B A B ...) in one run.

Every engine does two things:

- Whole answers, as a user gets them. A prompt of random tokens is pre-filled, and an answer is
  generated, with warm-up, choice and gathering. (Speed does not depend on the text.)
- Bursts of a few tokens at a fixed length of context, always from the same place. They give the
  speed of decoding alone, to compare with the bytes per token.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from coreinfer_edge.choose.statistics import Level, level_names
from coreinfer_edge.errors import ArgumentError, UnsupportedModelError
from coreinfer_edge.measure import engines as bench_engines
from coreinfer_edge.measure.baselines import Baseline, BaselineError, Wanted, check_fits
from coreinfer_edge.measure.description import describe
from coreinfer_edge.measure.engines import LlamaEngine
from coreinfer_edge.measure.machine import Machine, this_machine
from coreinfer_edge.model.header import GGUFHeader, read_header
from coreinfer_edge.run.core_llama import CoreLlama
from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.run.options import Options
from coreinfer_edge.run.process_memory import peak_memory

DENSE = "dense"
OUR_KERNELS = "dense, our kernels"  # the whole model, as ``repack`` loads it
EXACT = "exact"  # the first density drafts, the whole model verifies

# A row with a spread above this is measured again; if the spread stays, the report warns of it.
NOISY = 0.05

# A burst takes about this time, within these numbers of tokens.
BURST_SECONDS = 0.15
BURST_LEAST, BURST_MOST = 3, 32

# The threads of the previous engine go on spinning for a little while.
SETTLE_SECONDS = 0.05

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """The plan of a measurement.

    Attributes:
        densities: fractions of the FFN's bytes to read, each in (0, 1).
        prompt_tokens: tokens of a whole answer's prompt.
        tokens: tokens of the answer.
        contexts: tokens in the KV cache at which bursts are measured.
        rounds: number of turns of each engine.
        repeats: the most times that a noisy measurement is repeated.
        strategy: the strategy that chooses core sets.
        warmup: tokens decoded dense before the choice, or ``"auto"``.
        threads: CPU threads.
        gpu_layers: layers on a GPU.
        repack, levels: as in ``EdgeLLM``.
        answers: whether to measure whole answers too, which takes longest.
        processor_time: measure the processor's time of one thread instead of the time that passes,
            for a busy machine.
    """

    densities: Sequence[float]
    prompt_tokens: int = 256
    tokens: int = 128
    contexts: Sequence[int] = (256, 1024)
    rounds: int = 7
    repeats: int = 2
    strategy: str = "energy"
    warmup: Any = "auto"
    threads: int | None = None
    gpu_layers: int = 0
    repack: bool | None = None
    levels: tuple[Level, ...] | None = None
    answers: bool = True
    processor_time: bool = False


@dataclass(frozen=True)
class AnswerSpeed:
    """Whole answers of one engine; medians over the rounds.

    Attributes:
        engine: ``"dense"``, ``core_name`` of a core set, ``"exact"`` or another engine's name. It
            says so if the answers with a core set ended within the warm-up.
        density: fraction of the FFN in use at the end.
        prefill_tokens_per_second: prompt tokens over the time to the first token.
        first_token_seconds: time from the start to the first token.
        choose_seconds: time for choosing and gathering, part of decoding; None for other engines.
        decode_tokens_per_second: tokens after the first, over the time after the first, with
            warm-up, choice and gathering.
        answer_seconds: time from the start to the last token.
        spread: distance between the quartiles of the time for decoding, over its median.
        speedup: decoding compared with dense, median of the rounds.
        peak_memory_bytes: highest resident memory of the process so far, mapped file included.
    """

    engine: str
    density: float
    prefill_tokens_per_second: float
    first_token_seconds: float
    choose_seconds: float | None
    decode_tokens_per_second: float
    answer_seconds: float
    spread: float
    speedup: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class DecodeSpeed:
    """Decoding of one engine at one length of context; medians over the bursts.

    Attributes:
        engine: as in ``AnswerSpeed``.
        density: fraction of the FFN's bytes that was asked for.
        context: tokens in the KV cache.
        tokens_per_second: the speed.
        spread: distance between the quartiles of the time per token, over its median.
        speedup: compared with dense, median of the rounds.
        bytes_per_token: bytes of weights, keys and values that a token reads; None for other
            engines.
        bytes_ratio: ``bytes_per_token`` of dense over that of this engine.
        efficiency: speed-up compared with dense by the same kernels, over ``bytes_ratio``; at 1 the
            speed-up is that of the bytes saved. None where all weights are read.
        bandwidth_share: bytes read per second over the machine's best; None with a GPU.
    """

    engine: str
    density: float
    context: int
    tokens_per_second: float
    spread: float
    speedup: float
    bytes_per_token: int | None
    bytes_ratio: float | None
    efficiency: float | None
    bandwidth_share: float | None


@dataclass(frozen=True)
class SpeedReport:
    """The result of ``measure_speed``.

    Attributes:
        model: the file.
        model_bytes: its size.
        machine: the machine.
        plan: the plan.
        levels: the precisions that neurons of core sets could have.
        answers: whole answers, one element for each engine.
        decoding: decoding, one element for each engine and length of context.
        other_load: share of the processor's time that other programs took during the measurement.
        missing: the reason for each engine that could not be measured.
        warnings: measurements that stayed noisy.
    """

    model: str
    model_bytes: int
    machine: Machine
    plan: Plan
    levels: tuple[Level, ...]
    answers: list[AnswerSpeed]
    decoding: list[DecodeSpeed]
    other_load: float
    missing: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Timed:
    """One whole answer: seconds to its first and last token and for the choice, and its density.

    ``is_warmup``: it was to have a core set, and ended before.
    """

    first: float
    last: float
    choose: float | None = None
    density: float = 1.0
    is_warmup: bool = False

    @property
    def decode(self) -> float:
        return self.last - self.first


def spread(values: Sequence[float]) -> float:
    """Distance between the quartiles over the median; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def speedup(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median of the ratios in each round: a slow phase of the machine affects both sides."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def efficiency(bursts: Mapping[str, Sequence[float]], name: str, bytes_ratio: float) -> float:
    """The speed-up of one over dense with the same kernels, over the bytes that it saves.

    Args:
        bursts: seconds of each round, by engine; DENSE where no layout of ours serves.
        name: of the engine.
        bytes_ratio: the bytes of a token that dense reads, over those that this engine reads.
    """
    return speedup(bursts.get(OUR_KERNELS, bursts[DENSE]), bursts[name]) / bytes_ratio


def in_turn(
    rounds: int, contestants: Mapping[str, Callable[[int], T]], advance: Callable[[], None]
) -> dict[str, list[T]]:
    """Call each in turn, A B C A B C ..., with the number of the round."""
    results: dict[str, list[T]] = {name: [] for name in contestants}
    for i in range(rounds):
        for name, act in contestants.items():
            time.sleep(SETTLE_SECONDS)
            results[name].append(act(i))
            advance()
    return results


class _OwnEngine(LlamaEngine):
    """One loaded model as several contestants, one for each core set."""

    def __init__(self, llama: CoreLlama) -> None:
        super().__init__(llama)
        assert llama.core is not None
        assert llama.chooser is not None
        self.core, self.chooser = llama.core, llama.chooser
        self._prompt = self._trial = llama.new_session()  # of the last ``fill``, ``choose``
        self.can_draft = llama.why_not_taken_back is None

    def answer_at(
        self, density: float | None, prompt: Sequence[int], n: int, exact: bool = False
    ) -> _Timed:
        self.llama.density, self.llama.exact = density, exact
        answer = self.answer(prompt, n)
        self.llama.exact = False
        run = self.llama.run
        choose = None if bench_engines.clock is time.process_time else run.choose_seconds
        is_warmup = run.steered and not run.core_tokens and not run.passes
        return _Timed(answer["first"], answer["last"], choose, run.density, is_warmup)

    def _evaluate(self, tokens: list[int]) -> None:
        """Also collects statistics, so that core sets can be chosen afterwards."""
        self.llama.reset()
        self._keep(0)
        self._prompt = self.llama.new_session()
        self._prompt.begin()
        self._prompt.prefill(tokens)

    def choose(self, density: float) -> int:
        """Gather the core set of a density; returns the bytes of all FFNs with it."""
        self._trial = self._prompt.branch(self._prompt.backend, self.chooser, density)
        self._trial.choose()
        self._trial.gather()
        self._trial.leave()
        return self._trial.run.core_bytes

    def core_burst(self, n: int) -> float:
        self._trial.gather()
        try:
            return self.burst(n)
        finally:
            self._trial.leave()


class SpeedRun:
    """Measures one model, and other engines beside it.

    Args:
        path: the GGUF file.
        plan: the plan.
        baselines: other engines by label, from ``wanted_baselines``.

    Raises:
        ArgumentError: the plan cannot be carried out on this model.
        UnsupportedModelError: the model has no dense FFN.
        ModelFileError: the file is missing, damaged or not a GGUF.
    """

    def __init__(self, path: Path, plan: Plan, baselines: Mapping[str, Wanted]) -> None:
        self._header, self._plan, self._wanted = read_header(path), plan, baselines
        self._advance: Callable[[], None] = lambda: None
        self._description = describe(self._header, densities=[1.0])
        self._rng = np.random.default_rng(0)
        self._baselines: dict[str, Baseline] = {}
        self._missing: dict[str, str] = {}
        self._warnings: list[str] = []
        self._n_ctx = max(
            plan.prompt_tokens + plan.tokens, max(plan.contexts, default=0) + BURST_MOST + 2
        )
        self._check()

    def _check(self) -> None:
        for density in self._plan.densities:
            if not 0 < density < 1:
                raise ArgumentError(
                    f"density {density:g}: it must be above 0 and below 1; dense is measured anyway"
                )
        if self._plan.strategy == DENSE:
            raise ArgumentError("strategy dense has no core sets: name another one")
        plan = self._plan
        if Options(plan.densities[0], plan.strategy, levels=plan.levels).settled().sets_once:
            raise ArgumentError(
                "strategy static with levels sets them once, for one density, and bench compares"
                " several: name another strategy, or leave levels out"
            )
        if self._plan.processor_time and self._plan.threads != 1:
            raise ArgumentError("processor time measures one thread: add --threads 1")
        if not self._description.densities:
            raise UnsupportedModelError(f"{self._header.path}: {self._description.note}")
        trained = self._description.context_length
        if trained and self._n_ctx > trained:
            raise ArgumentError(
                f"the model's context is {trained} tokens, and the measurement needs {self._n_ctx}:"
                " give smaller --contexts, --prompt-tokens or --tokens"
            )

    @property
    def steps(self) -> int:
        """Number of calls of ``advance``, if nothing is noisy and no engine is missing."""
        n, plan = len(self._wanted), self._plan
        n_whole = 1 + (plan.repack is not False)  # if there are kernels of ours
        answers = n + n_whole + len(plan.densities) + 1 if plan.answers else 0
        bursts = (n_whole + 1) * len(plan.densities) + (n + 1 if n else 0)
        return plan.rounds * (answers + len(plan.contexts) * bursts)

    def measure(self, advance: Callable[[], None] = lambda: None) -> SpeedReport:
        """Load the model and the other engines, and measure everything.

        Args:
            advance: called after each thing measured.
        """
        plan, self._advance = self._plan, advance
        bench_engines.use_clock(plan.processor_time)
        options: dict[str, Any] = {
            "n_gpu_layers": plan.gpu_layers,
            "n_ctx": self._n_ctx,
            "repack": plan.repack,
        }
        if plan.threads:
            options |= {"n_threads": plan.threads, "n_threads_batch": plan.threads}
        density = plan.densities[0]
        with (
            EdgeLLM(self._header, strategy=DENSE, **options) as plain,
            EdgeLLM(
                self._header, density, plan.strategy, plan.warmup, levels=plan.levels, **options
            ) as llm,
            ExitStack() as stack,
        ):
            for name, wanted in self._wanted.items():
                self._start(stack, name, wanted, llm.llama.n_threads)
            others = OtherPrograms()
            own, dense = _OwnEngine(llm.llama), LlamaEngine(plain.llama)
            answers = self._answers(dense, own) if plan.answers else []
            decoding: list[DecodeSpeed] = []
            for context in plan.contexts:
                decoding += self._decoding(dense, own, context)
            other_load = others.share()
            machine = this_machine(llm.llama.n_threads)  # last, because it needs memory itself
            if not plan.gpu_layers:
                decoding = [_with_share(speed, machine.read_bytes_per_second) for speed in decoding]
            return SpeedReport(
                model=str(self._header.path),
                model_bytes=self._description.file_bytes,
                machine=machine,
                plan=plan,
                levels=own.chooser.levels,
                answers=answers,
                decoding=decoding,
                other_load=other_load,
                missing=self._missing,
                warnings=self._warnings,
            )

    def _start(self, stack: ExitStack, name: str, wanted: Wanted, threads: int) -> None:
        try:
            check_fits(wanted.engine, self._description.parameters)
            baseline = Baseline(wanted, self._n_ctx, threads, self._plan.processor_time)
            engine = stack.enter_context(baseline)
            # the first answer is slower, or fails
            engine.answer(self._prompt(self._plan.prompt_tokens), self._plan.tokens)
        except BaselineError as error:
            self._missing[name] = str(error)
        else:
            self._baselines[name] = engine

    def _prompt(self, n: int) -> list[int]:
        n_vocab = self._description.vocabulary
        least = min(256, n_vocab // 2)  # control tokens come first in a vocabulary
        tokens: list[int] = self._rng.integers(least, n_vocab, n).tolist()
        return tokens

    def _measured(
        self,
        what: str,
        contestants: Mapping[str, Callable[[int], T]],
        seconds: Callable[[T], float],
    ) -> dict[str, list[T]]:
        """Measure all in turn, again while it is noisy; returns the quietest results."""
        tries = []
        for _ in range(self._plan.repeats + 1):
            results = in_turn(self._plan.rounds, contestants, self._advance)
            noise = max(spread([seconds(value) for value in of]) for of in results.values())
            tries.append((noise, results))
            if noise <= NOISY:
                break
        noise, results = min(tries, key=lambda tried: tried[0])
        if noise > NOISY:
            self._warnings.append(f"{what}: spread {noise:.0%}, measured {len(tries)} times")
        return results

    # --- whole answers ---

    def _answers(self, dense: LlamaEngine, own: _OwnEngine) -> list[AnswerSpeed]:
        """Whole answers of a plain dense model, of core sets, and of the other engines."""
        plan = self._plan
        prompts = [self._prompt(plan.prompt_tokens) for _ in range(plan.rounds)]

        def of(engine: LlamaEngine | Baseline) -> Callable[[Sequence[int]], _Timed]:
            return lambda prompt: _Timed(**engine.answer(prompt, plan.tokens))

        def with_core(
            density: float | None, exact: bool = False
        ) -> Callable[[Sequence[int]], _Timed]:
            return lambda prompt: own.answer_at(density, prompt, plan.tokens, exact)

        answering = {
            DENSE: of(dense),
            **({OUR_KERNELS: with_core(None)} if own.llama.packed_bytes else {}),
            **{core_name(d, own.chooser.levels): with_core(d) for d in sorted(plan.densities)},
            **({EXACT: with_core(plan.densities[0], exact=True)} if own.can_draft else {}),
        }
        peaks = {}
        for name, answer in answering.items():  # once unmeasured: reads the model, takes memory
            answer(self._prompt(plan.prompt_tokens))
            peaks[name] = peak_memory()
        for name, engine in self._baselines.items():
            answering[name] = of(engine)
            peaks[name] = engine.peak_memory

        def in_round(answer: Callable[[Sequence[int]], _Timed]) -> Callable[[int], _Timed]:
            return lambda i: answer(prompts[i])

        contestants = {name: in_round(answer) for name, answer in answering.items()}
        results = self._measured("whole answers", contestants, lambda timed: timed.decode)
        of_dense = [timed.decode for timed in results[DENSE]]
        return [
            self._answer_speed(name, timed, of_dense, peaks[name])
            for name, timed in results.items()
        ]

    def _answer_speed(
        self, name: str, timed: Sequence[_Timed], dense: Sequence[float], peak: int
    ) -> AnswerSpeed:
        plan = self._plan
        first = statistics.median(one.first for one in timed)
        decode = [one.decode for one in timed]
        choose = [one.choose for one in timed if one.choose]
        return AnswerSpeed(
            engine=f"{name}: all warm-up, dense" if timed[0].is_warmup else name,
            density=timed[0].density,
            prefill_tokens_per_second=plan.prompt_tokens / first,
            first_token_seconds=first,
            choose_seconds=statistics.median(choose) if choose else None,
            decode_tokens_per_second=(plan.tokens - 1) / statistics.median(decode),
            answer_seconds=statistics.median(one.last for one in timed),
            spread=spread(decode),
            speedup=speedup(dense, decode),
            peak_memory_bytes=peak,
        )

    # --- decoding ---

    def _decoding(
        self, dense_engine: LlamaEngine, own: _OwnEngine, context: int
    ) -> list[DecodeSpeed]:
        """Bursts of a plain dense model beside each core set and beside the other engines."""
        plan = self._plan
        tokens = self._prompt(context)
        own.fill(tokens)
        dense_engine.fill(tokens)
        n = tokens_of_burst(dense_engine.burst(BURST_LEAST))
        weights = self._description.densities[0].read_bytes_per_token
        dense_bytes = weights + cached_bytes(self._header, context)

        def speed(
            name: str, density: float, bursts: dict[str, list[float]], n_bytes: int | None
        ) -> DecodeSpeed:
            other = bursts[name]
            ratio = dense_bytes / n_bytes if n_bytes else None
            return DecodeSpeed(
                engine=name,
                density=density,
                context=context,
                tokens_per_second=1 / statistics.median(other),
                spread=spread(other),
                speedup=speedup(bursts[DENSE], other),
                bytes_per_token=n_bytes,
                bytes_ratio=ratio,
                efficiency=efficiency(bursts, name, ratio) if ratio and density < 1 else None,
                bandwidth_share=None,
            )

        result: list[DecodeSpeed] = []
        whole = {DENSE: _each_round(dense_engine.burst, n)}
        if own.llama.packed_bytes:
            whole[OUR_KERNELS] = _each_round(own.burst, n)
        for density in plan.densities:
            name = core_name(density, own.chooser.levels)
            n_bytes = dense_bytes - own.core.full_bytes + own.choose(density)
            bursts = self._measured(
                f"{name}, context {context}",
                {**whole, name: _each_round(own.core_burst, n)},
                float,
            )
            if not result:
                result += [speed(other, 1.0, bursts, dense_bytes) for other in whole]
            result.append(speed(name, density, bursts, n_bytes))
        if self._baselines:
            bursts = self._measured(
                f"other engines, context {context}",
                self._other_bursts(dense_engine, tokens, n),
                float,
            )
            result += [speed(name, 1.0, bursts, None) for name in self._baselines]
        return result

    def _other_bursts(
        self, dense: LlamaEngine, tokens: list[int], n: int
    ) -> dict[str, Callable[[int], float]]:
        contestants = {DENSE: _each_round(dense.burst, n)}
        for name, engine in self._baselines.items():
            engine.fill(tokens)
            contestants[name] = _each_round(engine.burst, n)
        return contestants


def _each_round(burst: Callable[[int], float], n: int) -> Callable[[int], float]:
    return lambda _: burst(n)


def _with_share(speed: DecodeSpeed, bandwidth: float) -> DecodeSpeed:
    if speed.bytes_per_token is None:
        return speed
    share = speed.bytes_per_token * speed.tokens_per_second / bandwidth
    return replace(speed, bandwidth_share=share)


def core_name(density: float, levels: Sequence[Level]) -> str:
    return f"core {density:g} ({level_names(levels)})"


def tokens_of_burst(seconds_per_token: float) -> int:
    return max(BURST_LEAST, min(BURST_MOST, round(BURST_SECONDS / seconds_per_token)))


def cached_bytes(header: GGUFHeader, n_cached: int) -> int:
    """Bytes of the keys and values of ``n_cached`` tokens, in half precision as in llama.cpp."""
    width = 0
    for name, tensor in header.tensors.items():
        if re.search(r"\.attn_[kv]\.weight", name):
            width += tensor.shape[1]
        elif re.search(r"\.attn_qkv\.weight", name):  # the queries are as wide as the input
            width += tensor.shape[1] - tensor.shape[0]
    return n_cached * width * 2


class OtherPrograms:
    """Measures the processor time of other programs, from now on."""

    def __init__(self) -> None:
        self._busy, self._total = self._others(), time.perf_counter()

    @staticmethod
    def _others() -> float:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        busy = sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            of_process = process.cpu_times()
            busy -= of_process.user + of_process.system
        return busy

    def share(self) -> float:
        """Their share of the time of all processors."""
        seconds = (time.perf_counter() - self._total) * (psutil.cpu_count() or 1)
        return max(0.0, (self._others() - self._busy) / seconds)
