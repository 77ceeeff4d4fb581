"""llama_cpp.Llama that decodes with core sets: whenever it evaluates, a ``Session`` says how."""

from __future__ import annotations

import itertools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from coreinfer_edge.binding import forked
from coreinfer_edge.binding.core import CoreContext, check_rpc, devices
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.binding.placement import DevicePlacement, Placement
from coreinfer_edge.choose.chooser import Chooser, density_of
from coreinfer_edge.choose.prior import Prior
from coreinfer_edge.choose.statistics import CoreSet, Extra, Floats, Level
from coreinfer_edge.errors import (
    ArgumentError,
    NotCopyableError,
    PromptTooLongError,
    UnsupportedModelError,
)
from coreinfer_edge.model.chat_templates import CheckedLlama
from coreinfer_edge.run.arguments import check_density, check_quality
from coreinfer_edge.run.dense_prefix import LEAST_TOKENS, DensePrefix, segment_ends
from coreinfer_edge.run.exact import ROUND, Draft, Exact, Pace, WherePasses
from coreinfer_edge.run.options import DRAFT_DENSITY
from coreinfer_edge.run.process_memory import major_faults, private_bytes
from coreinfer_edge.run.session import AUTO_TOKENS, Run, Session, Settings, all_neurons

# What drafting a token costs while passes stream weights, in passes, before it is measured.
STREAMED_DRAFT = 0.3

CLOSED = "this model is closed: make a new EdgeLLM"
NOT_COPYABLE = (
    "a loaded model cannot be pickled or copied: load it again from its file where it is needed"
)
_ENDED = (
    "another call has begun on this model, which ends this one: finish one stream before the next,"
    " or use two EdgeLLMs"
)
_FROM_WITHIN = (
    "a call of a model from within another of the same (in a logits processor, a stopping"
    " criterion, a signal handler) cannot work: wait until that one is over"
)


class _Stopped(Exception):
    """``Asked.stop_when`` has said so, while there is no token yet."""


@dataclass(frozen=True)
class Asked:
    """What one call asks for besides the binding's arguments.

    Attributes:
        density: in place of the model's; None for that one.
        quality: in place of the model's; without a density it means ``"auto"``.
        exact: whether the core set only drafts, in place of the model's.
        stop_when: asked before each token, each part of the prompt and each trial of a density; if
            it is true the answer ends there.
        on_token: called with each token and the logits [n_vocab] that it was drawn from, which
            hold until it returns.
    """

    density: float | Literal["auto"] | None = None
    quality: float | None = None
    exact: bool | None = None
    stop_when: Callable[[], bool] | None = None
    on_token: Callable[[int, Floats], None] | None = None

    @property
    def stops(self) -> bool:
        """Whether the answer is to end now."""
        return self.stop_when is not None and self.stop_when()


class CoreLlama(CheckedLlama):
    """llama_cpp.Llama whose ``generate`` decodes with a core set.

    Everything built on ``generate`` (completions, chat) gets the core path; evaluating by hand
    stays dense. ``DensePrefix`` says what a call takes over from those before it.

    One thread at a time computes, each of them holding ``lock``: a completion to its end, a stream
    while it computes its next piece, and not between two. The next call of any kind that computes
    ends a stream that is open; going on with the stream then raises ArgumentError. ``close`` waits
    for the evaluation under way, and whatever goes on afterwards raises ArgumentError.

    Arguments beyond those of ``llama_cpp.Llama``:

    Args:
        density: fraction of FFN neurons to keep, averaged over the layers, or ``"auto"``; None or
            1.0 for the whole model. It is an attribute too: what it is set to holds from the next
            run on.
        quality: the KL divergence in nats that ``"auto"`` keeps to.
        strategy: one of ``strategies.STRATEGIES``, or ``"dense"``.
        layers: densities of some layers by number.
        refresh: number of tokens after which the core set is chosen again, None for never.
        warmup: number of generated tokens to decode dense first, or ``"auto"``.
        files: the GGUF files of the model.
        prior: statistics from calibration, if there are any.
        placement: where the weights go, None for wherever llama.cpp puts them.
        most_density: the most that ``"auto"`` may choose.
        levels: the levels of precision that neurons can have, None for all that there are here.
        set_once: choose and gather now, for all prompts, and evaluate prompts and answers with that
            alone. The strategy must need no prompt.
        no_core_set: why the model can have none; None if it can.
        exact: the core set drafts, and dense passes verify. An attribute too, as density.
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
        placement: Placement | DevicePlacement | None = None,
        most_density: float = 1.0,
        levels: Sequence[Level] | None = None,
        set_once: bool = False,
        no_core_set: str | None = None,
        exact: bool = False,
        **llama_kwargs: Any,
    ) -> None:
        self._core: CoreContext | None = None
        self.lock = threading.RLock()
        self._gone: str | None = None  # why the model can no longer be used
        self._computing_thread: int | None = None
        self._readers: dict[int, int] = {}  # calls of the vocabulary, which take no lock, by thread
        self._no_readers = threading.Condition()
        forked.check_threads(llama_kwargs.get("n_threads"), llama_kwargs.get("n_threads_batch"))
        if llama_kwargs.get("draft_model") is not None:
            # the binding keeps the logits of all tokens then, in an array that must have the room
            llama_kwargs["logits_all"] = True
        self._placement = placement
        if placement is not None:
            llama_kwargs.update(placement.llama_arguments(files))
        super().__init__(**llama_kwargs)
        self.density = 1.0 if strategy == "dense" else density
        self._no_core_set = no_core_set
        self._unread = placement is not None and placement.streamed  # weights of the FFNs
        self._streamed = self._unread and not set_once
        self._once: Mapping[int, CoreSet] | None = None  # the core sets of all runs
        self._density_once = self.density
        dear = placement is not None and placement.dense_is_dear and not set_once
        self._settings = Settings(quality, refresh, warmup, most_density, dear)
        self.exact = exact = exact and strategy != "dense"
        self._planned_exact = exact
        self._answer_from = 0  # the position of the answer of the last run
        self._paces: dict[float, Pace] = {}  # of each density
        # A network is no bus: weights are not sent there for every pass.
        across_bus = isinstance(placement, DevicePlacement) and placement.ffn == "host"
        if across_bus and not any(device.is_remote for device in devices()):
            self._where_passes: WherePasses | None = WherePasses()
        else:
            self._where_passes = None
        self._reads_on = False  # whether weights are read ahead of the passes
        self._chooser: Chooser | None = None
        self._prompt: list[int] | None = None  # of the run; None: go on from what is there
        self._prefix = DensePrefix()
        self.session = self.new_session(steered=False)  # of the last run
        self._open: Run | None = None  # the last run, as long as it goes on
        self._next = self._asked = Asked()  # of the run that begins next, and of the last one
        forked.watch(self)
        try:
            if exact:
                self._check_taken_back()
            if strategy != "dense":
                below_full = levels is not None and tuple(levels) != ("full",)
                self._attach(files, density is None, self.packed or below_full)
            self.exact = self._planned_exact = exact and self._core is not None
            if self._core is not None:
                self._chooser = Chooser(
                    strategy,
                    self._core.ffns,
                    llama_cpp.llama_model_n_layer(self.model),
                    # read with the first choice: starting must not wait for them
                    self._core.down_norms if prior is None else prior.down_norms,
                    prior,
                    layers,
                    levels,
                )
                if density is not None and density != "auto":
                    self._chooser.densities(density)  # refuse now what cannot be
                    if set_once:
                        self._set_once(density)
        except BaseException:
            self.close()  # or the model would live as long as the exception
            raise

    def pace(self, density: float) -> Pace:
        """What drafting with a density has cost and given so far."""
        key = round(density, 2)  # a few for all densities that calls may have
        if key not in self._paces:
            assert self._core is not None
            n_bytes = int(llama_cpp.llama_model_size(self.model))
            part = 1 - (1 - density) * self._core.full_bytes / n_bytes
            self._paces[key] = Pace(STREAMED_DRAFT if self._settings.dear else part)
        return self._paces[key]

    def _attach(self, files: Sequence[Path], whole: bool, packed: bool) -> None:
        try:
            self._core = CoreContext(self.ctx, files, self.n_threads_batch, packed, self.lock)
        except UnsupportedModelError:
            if not whole:  # which any model can be run as
                raise
        if self._core is not None and self._placement is not None and self._streamed:
            self._core.stream_ahead(self._placement.read_ahead)

    def _set_once(self, density: float) -> None:
        assert self._core is not None
        assert self._chooser is not None
        self._once = self._chooser.choose(self._core.statistics(), density)
        if self._unread and not self._once:
            self._once = all_neurons(self._core.ffns)
        self._core.set_core(self._once)
        self._core.use_core(True)

    def _check_once(self, density: float | str | None) -> None:
        if density != self._density_once:
            raise ArgumentError(
                f"density is {density!r}, but the levels were set for {self._density_once!r} when"
                " this model was loaded: load it again with the other density"
            )

    def _run_on_levels(self, run: Run) -> None:
        """A run begins with the levels that were set once."""
        assert self._once is not None
        assert self._core is not None
        self._core.set_core(self._once)  # nothing is gathered unless another was set by hand
        self._core.use_core(True)
        self.session.core_sets = self._once
        run.set_once, run.core_bytes = True, self._core.core_bytes
        run.density = density_of(self._once, self._core.ffns)
        run.levels = self._chooser.levels if self._chooser else ()

    def close(self) -> None:
        """Free the model, the context and the core set; waits for the evaluation under way."""
        me = threading.get_ident()
        if self._computing_thread == me or me in self._readers:
            raise ArgumentError(_FROM_WITHIN)
        self._gone = self._gone or CLOSED  # a call that holds the lock ends with its next step
        with self.lock, self._no_readers:
            self._no_readers.wait_for(lambda: not self._readers)
            self._free()

    def _free(self) -> None:
        self.free(self._gone or CLOSED)
        if self._core is not None:
            self._core.close()
            self._core = None

    def __del__(self) -> None:
        # Nobody is in a call any more, so the lock is free, unless Python ends.
        if "_dependents" in vars(self) and self.lock.acquire(blocking=False):
            try:
                self._free()
            finally:
                self.lock.release()

    def abandon(self, reason: str) -> None:
        """As ``forked`` asks."""
        self.leave(reason)
        self.lock = threading.RLock()
        self._no_readers = threading.Condition()
        self._readers = {}
        self._computing_thread = self._core = self._open = None
        self._gone = reason

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise NotCopyableError(NOT_COPYABLE)

    def _check_open(self) -> None:
        if self._gone is not None:
            raise ArgumentError(self._gone)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Around each step of a run: what is called within it on this thread is part of it."""
        with self.lock:
            self._check_open()
            if self._computing_thread is not None:
                raise ArgumentError(_FROM_WITHIN)
            self._computing_thread = threading.get_ident()
            try:
                yield
            finally:
                self._computing_thread = None

    @contextmanager
    def asking(self, asked: Asked) -> Iterator[None]:
        """Around what may begin a run: what it is asked for. The lock must be held."""
        before, self._next = self._next, asked
        try:
            yield
        finally:
            self._next = before

    @contextmanager
    def _by_hand(self) -> Iterator[bool]:
        """Around what changes the context: whether it is done by hand, which ends the run."""
        if self._computing_thread == threading.get_ident():
            yield False
            return
        with self.lock:
            self._check_open()
            self._end(self._open)
            yield True

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Around what reads the vocabulary, beside a run of another thread: ``close`` waits."""
        me = threading.get_ident()
        with self._no_readers:
            self._check_open()
            self._readers[me] = self._readers.get(me, 0) + 1
        try:
            yield
        finally:
            with self._no_readers:
                self._readers[me] -= 1
                if self._readers[me] == 0:
                    del self._readers[me]
                    self._no_readers.notify_all()

    def tokenize(self, *args: Any, **kwargs: Any) -> list[int]:
        """As ``llama_cpp.Llama.tokenize``."""
        with self._reading():
            return super().tokenize(*args, **kwargs)

    def detokenize(self, *args: Any, **kwargs: Any) -> bytes:
        """As ``llama_cpp.Llama.detokenize``."""
        with self._reading():
            return super().detokenize(*args, **kwargs)

    def reset(self) -> None:
        """As ``llama_cpp.Llama.reset``; ends a stream that is open."""
        with self._by_hand():
            super().reset()  # type: ignore[no-untyped-call]
            self._prefix.cut(0)

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """As ``llama_cpp.Llama.embed``; ends a stream that is open."""
        with self._by_hand():
            return super().embed(*args, **kwargs)

    def save_state(self) -> Any:
        """As ``llama_cpp.Llama.save_state``, with what later prompts may go on from."""
        with self.lock:
            self._check_open()
            state: Any = super().save_state()
            state.dense_prefix = self._prefix.copy()
            return state

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """As ``llama_cpp.Llama.load_state``; ends a stream that is open."""
        with self._by_hand():
            self._prefix.cut(0)
            super().load_state(state)
            self._prefix = getattr(state, "dense_prefix", DensePrefix()).copy()

    @property
    def core(self) -> CoreContext | None:
        """The core context, for evaluating by hand; None with the strategy ``dense``."""
        return self._core

    @property
    def has_own_densities(self) -> bool:
        """Whether a call can have a density of its own."""
        return self._core is not None and self._once is None and self._no_core_set is None

    @property
    def may_be_auto(self) -> bool:
        """Whether a call can have the density ``"auto"``."""
        return self.has_own_densities and not self.exact and self._may_compare

    @property
    def may_be_whole(self) -> bool:
        """Whether a call can have the density 1."""
        return self.has_own_densities and not self._settings.dear

    @property
    def _may_compare(self) -> bool:
        """Whether there is room for the logits that densities are compared by."""
        planned = 0 if self._placement is None else self._placement.n_outputs
        return planned == 0 or planned >= AUTO_TOKENS

    @property
    def chooser(self) -> Chooser | None:
        """What chooses the core sets; None with the strategy ``dense``."""
        return self._chooser

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """As in the binding, which loads cached states and sets the seed in here."""
        steps = super()._create_completion(*args, **kwargs)
        run: Run | None = None
        over = False
        while not over:
            with self.lock:
                self._check_open()
                if run is not None and self._open is not run:
                    raise ArgumentError(_ENDED)
                seed = self.seed
                chunks = list(itertools.islice(steps, 1))
                if kwargs.get("seed") is not None:
                    self.set_seed(seed)  # it was for this call alone
                run = self._open
                over = run is None
                if over:  # what is left to tell is known, and the state to cache is still this one
                    chunks += steps
            yield from chunks

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """As ``llama_cpp.Llama.generate``: pre-fill dense, choose, decode with the core set.

        The run begins with the first token that is asked for.
        """
        if len(tokens) == 0:
            raise ArgumentError("the prompt has no tokens: give at least one")
        if len(tokens) > len(self.input_ids):
            raise prompt_too_long(len(tokens), len(self.input_ids))
        reset = kwargs.get("reset", args[6] if len(args) > 6 else True)
        steps = super().generate(tokens, *args, **kwargs)
        run: Run | None = None
        sent: Sequence[int] | None = None
        try:
            while True:
                with self._computing():
                    if run is None:
                        run = self._begin(list(tokens), reset)
                    elif self._open is not run:
                        raise ArgumentError(_ENDED)
                    # The binding goes on to complete a character, but there may be no room.
                    over = run.prompt_tokens + run.completion_tokens > len(self.input_ids)
                    if not over:
                        try:
                            token = self._step(run, steps, sent)
                        except _Stopped:
                            over = run.stopped = True
                    if over:
                        token = self.token_eos()
                if token is None:
                    return
                sent = yield token
                if over:
                    return
        finally:
            steps.close()
            # Not waiting for the lock: Python may be collecting a generator that was dropped, in
            # any thread and at any time. Whoever holds it computes, and ends this run first.
            if run is not None and self._open is run and self.lock.acquire(blocking=False):
                try:
                    self._end(run)
                finally:
                    self.lock.release()

    def _step(
        self,
        run: Run,
        steps: Generator[int, Sequence[int] | None, None],
        sent: Sequence[int] | None,
    ) -> int | None:
        """The next token; None at the end."""
        self._check_stop()
        first, chosen = not self.session.prefilled, run.choose_seconds
        faults = major_faults()
        start = time.perf_counter()
        try:
            token = steps.send(sent)
        except StopIteration:
            return None
        seconds = time.perf_counter() - start - (run.choose_seconds - chosen)
        run.completion_tokens += 1
        if not first:
            run.decode_seconds += seconds
        if self.session.core_sets is not None and not first and self.session.exact is None:
            run.core_tokens += 1
            run.core_seconds += seconds
            if run.choose_seconds == chosen:
                run.core_faults += major_faults() - faults
        if self._asked.on_token is not None:
            self._asked.on_token(token, self.last_logits())
        return token

    def _check_stop(self) -> None:
        if self._asked.stops:
            raise _Stopped

    def _begin(self, prompt: list[int], reset: bool) -> Run:
        """Start a run, which ends the one that is open."""
        self._end(self._open)
        asked = self._next
        exact = self._is_exact(asked)
        density = self._density(asked, exact)
        if self._once is not None:
            self._check_once(density)
        run = Run(prompt_tokens=len(prompt))
        # with all neurons too, where the weights are not in memory and gathering brings them there
        steered = self._core is not None and (density not in (None, 1.0) or self._streamed)
        steered = steered and self._once is None
        if exact and not self._settings.dear and isinstance(density, float):
            # drafts that cannot pay need no statistics either
            steered = steered and self.pace(density).may_pay
        self.session = self.new_session(run, steered, density, asked.quality, exact)
        if self._once is not None:
            self._run_on_levels(run)
        self._open, self._asked = run, asked
        self._answer_from = len(prompt) + (0 if reset else self.n_tokens)
        self._prompt = prompt if reset else None
        run.packed_bytes = self.packed_bytes
        self.session.begin()
        # Each part reads all weights: where they come from far, the fewer the better.
        # In llama.cpp's own layout an exact answer is llama.cpp's.
        whole = density == 1.0 or (exact and not self.packed)
        by_message = not whole and not self._settings.dear
        extra = self._chooser.extra if steered and self._chooser else Extra()
        kind = (steered, by_message, extra)
        if (self._prefix.steered, self._prefix.by_message, self._prefix.extra) != kind or not reset:
            self._prefix = DensePrefix(*kind)
        if reset:
            end = self._prefix.common(prompt, self.n_tokens)
            self._prefix.cut(end)  # first: an interrupt may come in between
            self._prefix.cut(self.go_back(end))
        return run

    def _is_exact(self, asked: Asked) -> bool:
        """Whether a run is exact, checked."""
        if asked.exact is None:
            return self.exact
        if not isinstance(asked.exact, bool):
            raise ArgumentError(f"exact is {asked.exact!r}: it must be True or False")
        if not asked.exact or self._core is None:
            return False
        if self.draft_model is not None:
            raise ArgumentError("exact drafts itself: load the model without draft_model")
        if self._once is not None:
            raise ArgumentError(
                "exact needs the whole model, and levels were set once when this one was loaded:"
                " load it without strategy='static'"
            )
        if self._placement is not None and not self._planned_exact:
            raise ArgumentError(
                "exact needs room for more logits than were planned: load the model with exact=True"
            )
        self._check_taken_back()
        return True

    def _check_taken_back(self) -> None:
        if reason := self.why_not_taken_back:
            raise UnsupportedModelError(
                f"exact takes drafts back, which this model's cache cannot: {reason}"
            )

    def _density(self, asked: Asked, exact: bool) -> float | Literal["auto"] | None:
        """The density of a run, checked."""
        density = self.density if asked.density is None else asked.density
        if exact:
            if asked.quality is not None or asked.density == "auto":
                raise ArgumentError("exact loses nothing: leave density='auto' and quality out")
            density = DRAFT_DENSITY if density in (None, "auto") else density
        if asked.quality is not None:
            check_quality(asked.quality)
            density = "auto" if asked.density is None else density
        if density is None:
            return None
        check_density(density)
        if density != "auto":
            density = float(density)
        elif not self._may_compare:
            raise ArgumentError(
                "density='auto' needs room for more logits than were planned: load the model with"
                " density='auto'"
            )
        if self._no_core_set and density != 1.0:
            raise UnsupportedModelError(self._no_core_set)
        if self._core is None and density != 1.0:
            raise ArgumentError(
                f"density is {density!r}, but this model was loaded dense: load it with a"
                " density below 1"
            )
        most = self._settings.most_density
        is_whole = density == 1.0 and not self._settings.dear
        if asked.density is not None and density != "auto" and density > most and not is_whole:
            raise ArgumentError(
                f"density is {density!r}, and memory has room for {most:.2f}: give at most that, or"
                " load the model with more memory"
            )
        return density

    def new_session(
        self,
        run: Run | None = None,
        steered: bool = True,
        density: float | Literal["auto"] | None = None,
        quality: float | None = None,
        exact: bool | None = None,
    ) -> Session[None]:
        """A session after the tokens in the cache. By hand: while no run is open, in one thread."""
        chooser = self._chooser if steered else None
        backend = _OfLlama(self)
        exact = self.exact if exact is None else exact
        settings = self._settings._replace(exact=exact)
        if quality is not None:
            settings = settings._replace(quality=quality)
        density = density or self.density or 1.0
        session = Session(backend, chooser, density, settings, run)
        if steered and exact and isinstance(density, float):
            session.exact = Exact(session, backend, self.pace(density))
        return session

    @property
    def _scores(self) -> Any:
        # at the end of an answer the binding looks at the last, also if nothing was evaluated
        return self.scores[: max(1, self.n_tokens), :]

    @property
    def run(self) -> Run:
        """What the last run did, or the one under way has done so far."""
        return self.session.run

    def eval(self, tokens: Sequence[int]) -> None:
        """As ``llama_cpp.Llama.eval``: by hand dense, in a run as its session says."""
        with self._by_hand() as by_hand:
            if by_hand:
                self._prefix.cut(self.n_tokens)
                with self._dense(len(tokens)):
                    super().eval(tokens)
            elif not self.session.prefilled:
                start = time.perf_counter()
                self._prefill(tokens)
                llama_cpp.llama_synchronize(self.ctx)
                self.run.prefill_seconds = time.perf_counter() - start
            else:
                self._check_open()
                self.session.answer(tokens)

    def _prefill(self, tokens: Sequence[int]) -> None:
        """Evaluate the prompt in its parts, from where the cache ends."""
        session, prompt = self.session, self._prompt
        if prompt is None:
            # the parts are the binding's: it goes on from what is not known
            session.prefill(tokens)
            return
        first = start = self.n_tokens
        session.of_prompt = self._prefix.at(start)
        for end in self._ends(prompt):
            if end > start:
                self._check_open()
                if start > first:
                    self._check_stop()
                session.prefill(prompt[start:end])
                if end < len(prompt):
                    self._prefix.add(prompt, end, session.of_prompt)
                start = end

    def _ends(self, prompt: list[int]) -> list[int]:
        by_message = self._prefix.by_message
        return segment_ends(
            prompt,
            lambda token: by_message and self.ends_text(token),
            LEAST_TOKENS,
            self.n_batch,
        )

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
            self._end_stream(core)

    def _end_stream(self, core: CoreContext) -> None:
        self._reads_on = False
        streamed = core.end_stream()  # if reading failed, this says why evaluating has
        self.run.streamed_bytes += streamed.n_bytes
        self.run.stream_seconds += streamed.read_seconds
        self.run.stream_waited_seconds += streamed.waited_seconds

    def _read_on(self, core: CoreContext) -> None:
        """Read weights for all passes to come: what is drafted meanwhile hides the reading."""
        if self._streamed and not self._reads_on:
            core.begin_stream(2**31 - 1)
            self._reads_on = True

    def _stop_reading(self) -> None:
        if self._reads_on and self._core is not None:
            self._end_stream(self._core)

    def _passes(self, n_tokens: int) -> int:
        """How many graphs so many tokens are evaluated in."""
        n_ubatch = int(llama_cpp.llama_n_ubatch(self.ctx))
        batches, rest = divmod(n_tokens, self.n_batch)
        return batches * -(-self.n_batch // n_ubatch) + -(-rest // n_ubatch)

    def _note_memory(self) -> None:
        if self._placement is not None:
            self.run.peak_private = max(self.run.peak_private, private_bytes() or 0)

    def _end(self, run: Run | None) -> None:
        """A run is over, unless it was already: what is evaluated by hand is dense again."""
        if run is None or self._open is not run or sys.is_finalizing():
            return  # at its end Python may be without much already
        self._open = None
        if self._gone is None:
            self._note_memory()
            try:
                self._stop_reading()
            finally:
                self.session.end()
            if self.session.exact is not None:
                self._forget_drafts(run)

    def _forget_drafts(self, run: Run) -> None:
        """Keep what was told of an exact answer, without the last token, which was not read yet."""
        told = self._answer_from + max(0, run.completion_tokens - 1)
        if self.n_tokens > told and self.forget(told):
            self.n_tokens = told


@contextmanager
def _rpc_checked() -> Iterator[None]:
    """Around an evaluation: if an RPC server has gone, that is the error."""
    try:
        yield
    except RuntimeError as error:
        check_rpc(error)
        raise
    check_rpc()


class _OfLlama:
    """The ``Backend`` of a session: the one sequence of a ``CoreLlama``, which must not go first.

    The binding reads the logits itself, and samples from them.
    """

    def __init__(self, llama: CoreLlama) -> None:
        self._ref = weakref.ref(llama)  # the model is freed with the last reference to it

    @property
    def _llama(self) -> CoreLlama:
        llama = self._ref()
        if llama is None:
            raise ArgumentError(CLOSED)
        return llama

    @property
    def core(self) -> CoreContext:
        """As ``Backend`` says."""
        core = self._llama.core
        if core is None:
            raise ArgumentError(CLOSED)
        return core

    @property
    def n_tokens(self) -> int:
        """As ``Backend`` says."""
        return self._llama.n_tokens

    @property
    def most_again(self) -> int:
        """As ``Backend`` says."""
        placement = self._llama._placement
        most = placement.n_outputs if placement is not None else 0
        return min(self._llama.n_batch, most or self._llama.n_batch)

    def tokens_from(self, start: int) -> list[int]:
        """As ``Backend`` says."""
        llama = self._llama
        tokens: list[int] = llama.input_ids[start : llama.n_tokens].tolist()
        return tokens

    def dense(self, n_tokens: int) -> AbstractContextManager[None]:
        """As ``Backend`` says."""
        return self._llama._dense(n_tokens)

    def read(self, tokens: Sequence[int]) -> None:
        """As ``Backend`` says."""
        if self._llama._streamed:
            with _rpc_checked():  # whoever streams says why reading failed
                super(CoreLlama, self._llama).eval(tokens)
        else:
            self.decode(tokens)

    def decode(self, tokens: Sequence[int]) -> None:
        """As ``Backend`` says."""
        llama = self._llama
        try:
            with _rpc_checked():
                super(CoreLlama, llama).eval(tokens)
        except RuntimeError:
            if llama._core is not None and llama._unread:
                llama._core.end_stream()  # says so if it is the embedding that could not be read
            raise

    @property
    def most_verified(self) -> int:
        """As ``DraftingBackend`` says."""
        llama = self._llama
        n, placement = llama.n_tokens, llama._placement
        most = (placement.n_outputs if placement else 0) or llama.n_batch
        return min(most, llama.n_batch, len(llama.input_ids) - n, ROUND - n % ROUND)

    def drafts(self, tokens: Sequence[int]) -> Iterator[Draft]:
        """As ``DraftingBackend`` says."""
        llama, position = self._llama, self._llama.n_tokens
        vocab = llama_cpp.llama_model_get_vocab(llama.model)
        llama.forget(position)
        self.core.use_draft()
        try:
            with llama.sampler_ahead() as draw:
                while True:
                    logits = llama.ahead(tokens, position)
                    position += len(tokens)
                    probability = 1 / float(np.exp(logits - logits.max()).sum())
                    try:
                        token = draw()
                    except ArgumentError:  # the grammar is at an end with what was drafted
                        return
                    ends = bool(llama_cpp.llama_vocab_is_eog(vocab, token))
                    yield Draft(token, probability, ends)
                    tokens = [token]
        except RuntimeError:
            llama._stop_reading()  # says so if it is the embedding that could not be read
            raise
        finally:
            llama.forget(llama.n_tokens)

    def verify(self, tokens: Sequence[int], alone: bool) -> None:
        """As ``DraftingBackend`` says."""
        llama = self._llama
        llama._read_on(self.core)
        try:
            start, where = time.perf_counter(), llama._where_passes
            on_gpu = where is not None and len(tokens) > 1 and where.on_gpu()
            if alone:
                self.core.use_verify(on_gpu)
                llama.eval_each(tokens)
            else:
                self.core.use_core(False)
                super(CoreLlama, llama).eval(tokens)
            llama_cpp.llama_synchronize(llama.ctx)  # so that its time is known
            if alone and where is not None and len(tokens) > 1:
                where.passed(on_gpu, len(tokens), time.perf_counter() - start)
        except RuntimeError:
            llama._stop_reading()  # says why, if weights could not be read
            raise

    def stop_reading(self) -> None:
        """As ``DraftingBackend`` says."""
        self._llama._stop_reading()

    def take_back(self, n: int) -> None:
        """As ``Backend`` says."""
        self._remove(n)
        self._llama.n_tokens -= n

    def _remove(self, n: int) -> None:
        llama = self._llama
        if not llama.forget(llama.n_tokens - n):
            raise UnsupportedModelError(
                "this model's cache cannot take tokens back, which density='auto' and refresh need:"
                " give a density, and no refresh"
            )

    def again(self, n: int) -> Floats:
        """As ``Backend`` says."""
        llama = self._llama
        llama._check_stop()
        start = llama.n_tokens - n
        # First: what comes back is of another part, so rounded otherwise, or of a core set, and an
        # interrupt leaves it there.
        llama._prefix.cut(start)
        tokens = self.tokens_from(start)
        self.take_back(n)
        logits = llama.logits_of(tokens, start)
        llama.n_tokens += n
        return logits

    def restore(self, n: int) -> None:
        """As ``Backend`` says."""
        self.again(n)


def prompt_too_long(n_tokens: int, n_ctx: int) -> PromptTooLongError:
    """The error for a prompt of so many tokens in a context of n_ctx."""
    return PromptTooLongError(
        f"a prompt of {n_tokens} tokens and an answer do not fit into the context of {n_ctx}:"
        " shorten it, or give a larger n_ctx"
    )
