"""llama_cpp.Llama with a core path: pre-fill dense, choose, gather, decode with the core set."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coreinfer_edge.arguments import check_density
from coreinfer_edge.choose import Chooser, choose, density_of, keep_what_serves
from coreinfer_edge.core_context import CoreContext, CoreSet, Floats, Statistics
from coreinfer_edge.errors import (
    ArgumentError,
    InsufficientMemoryError,
    PromptTooLongError,
    UnsupportedModelError,
)
from coreinfer_edge.native import llama_cpp
from coreinfer_edge.placed_llama import PlacedLlama, Placement
from coreinfer_edge.prior import Prior
from coreinfer_edge.process_memory import available_bytes, major_faults, private_bytes
from coreinfer_edge.quality import Divergence, smallest_density

# Tokens that statistics should rest on, and the least and the most that warm-up adds to get there.
# SmolLM2, chat prompts of about 40 tokens: KL to dense 1.36 without warm-up, 0.90 after 64 tokens;
# even after 256 prompt tokens the first of the answer tell something new (0.77 and 0.75 after 32).
WARMUP_TARGET = 128
WARMUP_LEAST = 16
WARMUP_MOST = 64

# What a token of the warm-up weighs against one of the prompt: it is of the answer itself. SmolLM2,
# 24 chat prompts, 64 tokens of warm-up, KL with weights 8, 16, 32: 0.826, 0.797, 0.814.
WARMUP_WEIGHT = 16.0

# What earlier turns weigh against the tokens of this one.
TURN_DECAY = 0.5

# The last tokens before the choice, which density="auto" compares dense and core on: so many, but
# no more than this part of all, for the rest must tell which neurons matter.
AUTO_TOKENS = 32
AUTO_PART = 3

# How much less score a refresh must leave out of a layer for its core set to change.
REFRESH_GAIN = 0.05


class _Phase(Enum):
    IDLE = auto()  # evaluations that are not ours to steer: dense, nothing collected
    PREFILL = auto()
    WARMUP = auto()
    CORE = auto()


@dataclass
class Run:
    """What one run of ``generate`` does and takes; the source of its ``Figures``."""

    steered: bool = False  # whether it is to have a core set
    prompt_tokens: int = 0
    completion_tokens: int = 0
    warmup_tokens: int = 0
    warmup_left: int = 0
    core_tokens: int = 0
    density: float = 1.0
    estimated_kl: float | None = None
    core_bytes: int = 0
    repacked_bytes: int = 0
    refreshes: int = 0
    refresh_seconds: float = 0.0
    prefill_seconds: float = 0.0
    choose_seconds: float = 0.0
    decode_seconds: float = 0.0
    core_seconds: float = 0.0
    core_faults: int = 0
    streamed_bytes: int = 0
    stream_seconds: float = 0.0
    stream_waited_seconds: float = 0.0
    peak_private: int = 0


@dataclass
class _History:
    """The statistics that a prompt starts from, and those that it leaves to the next.

    The same prompt again gets the very same statistics, and so the same core set. A prompt that
    goes on from the last answer (a second turn) carries all statistics on, weighted by TURN_DECAY;
    one that shares only half or more of the last prompt carries those of that prompt. Any other
    starts anew.
    """

    starting: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    at_prompt: Statistics | None = None
    at_end: Statistics | None = None
    same_prompt: bool = False

    def start(self, prompt: list[int]) -> bool:
        """A run begins: decide what is carried on, and say whether anything is."""
        self.starting = prompt
        self.same_prompt = prompt == self.prompt
        if self.same_prompt:
            return True
        common = llama_cpp.Llama.longest_token_prefix(self.evaluated, prompt)
        if common <= len(self.prompt):  # nothing of the last answer
            self.at_end = self.at_prompt if 2 * common >= len(self.prompt) else None
        # what holds if the run ends before its prompt is evaluated
        self.prompt, self.at_prompt = [], self.at_end
        return self.at_end is not None

    def prefilled(self, collected: Statistics) -> Statistics:
        """The prompt is evaluated: its statistics, with what is carried on."""
        if not self.same_prompt or self.at_prompt is None:
            carried = self.at_end
            self.at_prompt = collected if carried is None else collected.plus(carried, TURN_DECAY)
            self.prompt = self.starting
        return self.at_prompt

    def end(self, evaluated: list[int], statistics: Statistics) -> None:
        """A run is over: keep what the next may go on from."""
        self.evaluated = evaluated
        self.at_end = statistics


class CoreLlama(PlacedLlama):
    """llama_cpp.Llama whose ``generate`` decodes with a core set.

    Everything built on ``generate`` (completions, chat, server) gets the core path; evaluating by
    hand stays dense. Arguments beyond those of ``llama_cpp.Llama``:

    Args:
        density: fraction of FFN neurons to keep, averaged over the layers, or ``"auto"``; None for
            the whole model. It is an attribute too: what it is set to holds from the next run on.
            1.0 is the whole model with llama.cpp's own kernels, to the last bit.
        quality: the KL divergence in nats that ``"auto"`` keeps to.
        strategy: one of ``strategies.STRATEGIES``, or ``"dense"``.
        layers: densities of some layers by number.
        refresh: number of tokens after which the core set is chosen again, None for never.
        warmup: number of generated tokens to decode dense first, or ``"auto"``.
        files: the GGUF files of the model.
        prior: statistics from calibration, if there are any.
        placement: where the weights go, None for wherever llama.cpp puts them.
        most_density: the most that ``"auto"`` may choose.
        repack: multiply by our own kernels while decoding, from copies of the weights; None where
            there is memory for the whole model once more.
    """

    def __init__(
        self,
        *,
        density: float | Literal["auto"] | None,
        quality: float,
        strategy: str,
        layers: Mapping[int, float] | None,
        refresh: int | None,
        warmup: int | Literal["auto"],
        files: Sequence[Path],
        prior: Prior | None,
        placement: Placement | None = None,
        most_density: float = 1.0,
        repack: bool | None = False,
        **llama_kwargs: Any,
    ) -> None:
        self._core: CoreContext | None = None
        self._phase = _Phase.IDLE
        self.lock = threading.RLock()  # one thread at a time computes
        if llama_kwargs.get("draft_model") is not None:
            # the binding keeps the logits of all tokens then, in an array that must have the room
            llama_kwargs["logits_all"] = True
        super().__init__(placement=placement, files=files, **llama_kwargs)
        # llama.cpp rounds the context up; the binding's own arrays are as long as was asked for
        self._n_ctx = min(self._n_ctx, len(self.input_ids))
        self.density = density
        self._quality = quality
        self._refresh = refresh
        self._warmup = warmup
        self._most_density = most_density
        self._streamed = placement is not None and placement.streamed
        self._chooser: Chooser | None = None
        self._steered = False  # whether this run is to have a core set
        self._base: Statistics | None = None  # of the tokens that the native sums are without
        self._density_now = 1.0
        self._core_sets: dict[int, CoreSet] = {}
        self._core_from = 0  # position of the first token decoded with the core set
        self._history = _History()
        self.run = Run()
        try:
            if self.lora_path and not self._lora_adapter:
                # the binding misses that the pointer is NULL, and evaluating would end the process
                raise RuntimeError(f"failed to load the LoRA adapter {self.lora_path}")
            if strategy != "dense":
                self._attach(files, whole=density is None)
            if self._core is not None:
                self._repack(self._core, repack, files, bool(llama_kwargs.get("use_mmap", True)))
                self._chooser = Chooser(
                    strategy,
                    self._core.ffns,
                    llama_cpp.llama_model_n_layer(self.model),
                    # read with the first choice: starting must not wait for them
                    self._core.down_norms if prior is None else prior.down_norms,
                    prior,
                    layers,
                )
                if density is not None and density != "auto":
                    self._chooser.densities(density)  # refuse now what cannot be
        except BaseException:
            self.close()  # or the model would live as long as the exception
            raise

    def _attach(self, files: Sequence[Path], whole: bool) -> None:
        try:
            self._core = CoreContext(self.ctx, files, self.n_threads_batch)
        except UnsupportedModelError:
            if not whole:  # which any model can be run as
                raise
        if self._core is not None and self._placement is not None and self._placement.streamed:
            self._core.stream_ahead(self._placement.read_ahead)

    def _repack(
        self, core: CoreContext, wanted: bool | None, files: Sequence[Path], mapped: bool
    ) -> None:
        if wanted is None:
            # a mapped file is in the page cache, which counts as available
            size = sum(file.stat().st_size for file in files)
            if available_bytes()[0] < (2 if mapped else 1) * size:
                return
        elif not wanted:
            return
        try:
            core.repack(True)
        except InsufficientMemoryError:
            if wanted:
                raise
        if wanted and not core.repack_bytes:
            warnings.warn(
                "repack does nothing here: there are no kernels of ours for this processor and"
                " these types of weights",
                RuntimeWarning,
                stacklevel=2,
            )

    def close(self) -> None:
        """Free the model, the context and the core set."""
        super().close()
        if self._core is not None:
            self._core.close()
            self._core = None

    @property
    def core(self) -> CoreContext | None:
        """The core context, for evaluating by hand; None with the strategy ``dense``."""
        return self._core

    @property
    def chooser(self) -> Chooser | None:
        """What chooses the core sets; None with the strategy ``dense``."""
        return self._chooser

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """As ``llama_cpp.Llama.generate``: pre-fill dense, choose, decode with the core set."""
        if len(tokens) == 0:
            raise ArgumentError("the prompt has no tokens: give at least one")
        if len(tokens) > self._n_ctx:
            raise prompt_too_long(len(tokens), self._n_ctx)
        with self.lock:
            run = self._begin(list(tokens))
        steps = super().generate(tokens, *args, **kwargs)
        sent: Sequence[int] | None = None
        try:
            while True:
                if self._ctx.ctx is None:
                    raise ArgumentError("the model was closed while it generated: make a new one")
                if self.run is not run:
                    raise ArgumentError(
                        "another call has begun on this model, which ends this one: finish one"
                        " stream before the next, or use two EdgeLLMs"
                    )
                if run.prompt_tokens + run.completion_tokens > self._n_ctx:
                    # The binding goes on to complete a character, but there is no room.
                    yield self.token_eos()
                    return
                first, chosen = self._phase is _Phase.PREFILL, run.choose_seconds
                faults = major_faults()
                start = time.perf_counter()
                try:
                    with self.lock:
                        token = steps.send(sent)
                except StopIteration:
                    return
                seconds = time.perf_counter() - start - (run.choose_seconds - chosen)
                run.completion_tokens += 1
                if not first:
                    run.decode_seconds += seconds
                if self._phase is _Phase.CORE:
                    run.core_tokens += 1
                    run.core_seconds += seconds
                    if run.choose_seconds == chosen:
                        run.core_faults += major_faults() - faults
                sent = yield token
        finally:
            steps.close()
            self._end(run)

    def _begin(self, prompt: list[int]) -> Run:
        if self.density is not None:
            check_density(self.density)
        self.run = Run(prompt_tokens=len(prompt))
        self._phase = _Phase.PREFILL
        # with all neurons too, where the weights are not in memory and gathering brings them there
        self._steered = self._core is not None and (
            self.density not in (None, 1.0) or self._streamed
        )
        self.run.steered = self._steered
        if self._core is not None:
            self._core.use_repacked(self.density != 1.0)
            self.run.repacked_bytes = self._core.repack_bytes if self.density != 1.0 else 0
        if self._core is not None and self._steered:
            if not self._history.start(prompt) and self.cache is None:
                # Evaluate all of it: of tokens found in the KV cache there would be no statistics.
                # What a LlamaRAMCache brings back stays without; warm-up makes up for it.
                self.reset()  # type: ignore[no-untyped-call]
            assert self._chooser is not None
            self._base = self._history.at_prompt
            self._core.clear_statistics()
            self._core.collect(True, self._chooser.extra)
            self._core.use_core(False)
        return self.run

    def eval(self, tokens: Sequence[int]) -> None:
        """As ``llama_cpp.Llama.eval``, dense or with the core set as the phase asks."""
        if self._phase is _Phase.PREFILL:
            start = time.perf_counter()
            with self._dense(len(tokens)):
                super().eval(tokens)
            llama_cpp.llama_synchronize(self.ctx)
            self.run.prefill_seconds = time.perf_counter() - start
            self._phase = _Phase.WARMUP
            if self._core is not None and self._steered:
                self._base = self._history.prefilled(self._core.statistics())
                self._core.clear_statistics()
                self.run.warmup_left = self._warmup_tokens(float(self._base.n_tokens.max()))
            return
        if self._phase is _Phase.WARMUP and self._core is not None and self._steered:
            if self.run.warmup_left > 0:
                self.run.warmup_left -= len(tokens)
                self.run.warmup_tokens += len(tokens)
            else:
                self._fix(self._core)
                self._phase = _Phase.CORE
        elif (
            self._phase is _Phase.CORE
            and self._core is not None
            and self._refresh is not None
            and self.n_tokens - self._core_from >= self._refresh
        ):
            self._choose_again(self._core)
        if self._phase is not _Phase.CORE:
            with self._dense(len(tokens)):
                super().eval(tokens)
            return
        try:
            super().eval(tokens)
        except RuntimeError:
            if self._core is not None and self._streamed:
                self._core.end_stream()  # says so if it is the embedding that could not be read
            raise

    @contextmanager
    def _dense(self, n_tokens: int) -> Iterator[None]:
        """Around each dense evaluation: weights that are not in memory are read for it."""
        core = self._core
        if core is None or not self._streamed or n_tokens == 0:
            yield
            return
        core.set_core({})  # they take its place
        core.begin_stream(self._passes(n_tokens))
        try:
            yield
            self._note_memory()
        finally:
            streamed = core.end_stream()  # if reading failed, this says why evaluating has
            self.run.streamed_bytes += streamed.n_bytes
            self.run.stream_seconds += streamed.read_seconds
            self.run.stream_waited_seconds += streamed.waited_seconds

    def _passes(self, n_tokens: int) -> int:
        """How many graphs so many tokens are evaluated in."""
        n_ubatch = int(llama_cpp.llama_n_ubatch(self.ctx))
        batches, rest = divmod(n_tokens, self.n_batch)
        return batches * -(-self.n_batch // n_ubatch) + -(-rest // n_ubatch)

    def _note_memory(self) -> None:
        if self._placement is not None:
            self.run.peak_private = max(self.run.peak_private, private_bytes() or 0)

    def _warmup_tokens(self, seen: float) -> int:
        """How many tokens to decode dense, given the number of tokens in the statistics."""
        if self._warmup == "auto":
            # each token decoded dense would read all FFN weights
            return 0 if self._streamed and seen >= 1 else auto_warmup(seen)
        return self._warmup if seen >= 1 else max(1, self._warmup)

    def _with_base(self, decoded: Statistics) -> Statistics:
        """Of the prompt, what it carries on, and the tokens decoded dense."""
        return decoded if self._base is None else decoded.plus(self._base, 1.0)

    def _fix(self, core: CoreContext) -> None:
        """Choose the core set from the statistics so far, gather it, and decode with it."""
        assert self._chooser is not None
        start = time.perf_counter()
        warmup = core.statistics()
        statistics = self._base = self._with_base(core.statistics())
        core.clear_statistics()
        core.collect(False)
        self._density_now = (
            self._auto_density(core, self._chooser, statistics)
            if self.density == "auto"
            else self.density or 1.0
        )
        weighted = statistics.plus(warmup, WARMUP_WEIGHT - 1)
        self._gather(core, self._chooser.choose(weighted, self._density_now))
        self.run.choose_seconds += time.perf_counter() - start

    def _gather(self, core: CoreContext, chosen: dict[int, CoreSet]) -> None:
        if self._streamed and not chosen:  # all neurons, but in memory
            chosen = {0: CoreSet(np.arange(core.ffns[0].n_ff, dtype=np.int32), None)}
        core.set_core(chosen)
        core.use_core(True)
        self._note_memory()
        self._core_sets = chosen
        self._core_from = self.n_tokens
        self.run.density = density_of(chosen, core.ffns)
        self.run.core_bytes = core.core_bytes

    def _auto_density(self, core: CoreContext, chooser: Chooser, statistics: Statistics) -> float:
        """The smallest density that keeps to the quality on the last tokens before the choice.

        The core sets tried are chosen without those tokens, as they will be without what follows.
        """
        n = min(auto_tokens(self.n_tokens), self.n_batch)
        last = self.input_ids[self.n_tokens - n : self.n_tokens].tolist()
        core.collect(True, chooser.extra)
        with self._dense(n):
            dense = self._logits_again(last)
        core.collect(False)
        scored = chooser.scored(statistics.without(core.statistics()))
        core.clear_statistics()

        def estimate(density: float) -> float:
            if density > self._most_density:
                return np.inf
            core.set_core(choose(scored, chooser.densities(density)))
            core.use_core(True)
            divergence = Divergence()
            divergence.add(dense, self._logits_again(last))
            core.use_core(False)
            return divergence.kl

        density, self.run.estimated_kl = smallest_density(
            estimate, self._quality, chooser.least_density
        )
        if density > self._most_density:
            density = self._most_density
            self.run.estimated_kl = estimate(density)
        with self._dense(n):
            self._logits_again(last)  # so that the KV cache is dense again
        return density

    def _take_back(self, n: int) -> None:
        """Take the last tokens out of the KV cache."""
        if not self._ctx.kv_cache_seq_rm(-1, self.n_tokens - n, -1):
            raise UnsupportedModelError(
                "this model's cache cannot take tokens back, which density='auto' and refresh need:"
                " give a density, and no refresh"
            )

    def _logits_again(self, last: list[int]) -> Floats:
        """Evaluate the last tokens once more; the logits of each [n, n_vocab]."""
        self._take_back(len(last))
        self._batch.set_batch(batch=last, n_past=self.n_tokens - len(last), logits_all=True)
        self._ctx.decode(self._batch)
        logits: Floats = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits(self.ctx), shape=(len(last), self.n_vocab())
        ).copy()
        return logits

    def _choose_again(self, core: CoreContext) -> None:
        """Evaluate the tokens of the core set dense, and choose and gather with what they add."""
        assert self._chooser is not None
        start = time.perf_counter()
        tokens = self.input_ids[self._core_from : self.n_tokens].tolist()
        self._take_back(len(tokens))
        self.n_tokens = self._core_from
        core.use_core(False)
        core.collect(True, self._chooser.extra)
        with self._dense(len(tokens)):
            super().eval(tokens)
        statistics = self._with_base(core.statistics())
        core.collect(False)
        scored = self._chooser.scored(statistics)
        wanted = choose(scored, self._chooser.densities(self._density_now))
        self._gather(core, keep_what_serves(self._core_sets, wanted, scored, REFRESH_GAIN))
        self.run.refreshes += 1
        self.run.refresh_seconds += time.perf_counter() - start

    def _end(self, run: Run) -> None:
        if self.run is not run or sys.is_finalizing():
            # a generator dropped earlier and collected only now: another run is under way, or
            # Python ends and much is gone already
            return
        self._phase = _Phase.IDLE
        self._note_memory()
        if self._core is not None and self._steered:
            self._core.collect(False)
            self._core.use_core(False)
            # last, for it needs memory: without, the next run goes on from what was kept before
            self._history.end(self._input_ids.tolist(), self._with_base(self._core.statistics()))


def auto_tokens(n_tokens: int) -> int:
    """How many of the tokens so far ``density="auto"`` compares dense and core on."""
    return max(1, min(AUTO_TOKENS, n_tokens // AUTO_PART))


def auto_warmup(seen: float) -> int:
    """How many tokens ``warmup="auto"`` decodes dense, given the tokens in the statistics."""
    return max(WARMUP_LEAST, min(WARMUP_MOST, round(WARMUP_TARGET - seen)))


def prompt_too_long(n_tokens: int, n_ctx: int) -> PromptTooLongError:
    """The error for a prompt of so many tokens in a context of n_ctx."""
    return PromptTooLongError(
        f"a prompt of {n_tokens} tokens and an answer do not fit into the context of {n_ctx}:"
        " shorten it, or give a larger n_ctx"
    )
