"""EdgeLLM: pre-fill dense, fix a core set of neurons per layer, decode with only those."""

from __future__ import annotations

import ctypes
import inspect
import operator
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from numbers import Real
from pathlib import Path
from typing import Any, Literal, overload

import psutil

if sys.platform != "win32":
    import resource

from coreinfer_edge.choose import choose, energy, layer_densities
from coreinfer_edge.core_context import CoreContext, Floats, Statistics
from coreinfer_edge.errors import (
    ArgumentError,
    CoreInferError,
    InsufficientMemoryError,
    ModelFileError,
    NativeError,
    PromptTooLongError,
    UnsupportedModelError,
)
from coreinfer_edge.gguf_header import GGUFHeader, read_header
from coreinfer_edge.llama_log import captured_log
from coreinfer_edge.loadable import check_loadable
from coreinfer_edge.model_source import resolve
from coreinfer_edge.native import LlamaChatCompletionHandlerNotFoundException, llama_cpp

STRATEGIES = ("energy", "dense")

DEFAULT_CONTEXT = 4096

# Tokens that statistics should rest on, and the least and the most that warm-up adds to get there.
# SmolLM2, chat prompts of about 40 tokens: KL to dense 1.36 without warm-up, 0.90 after 64 tokens;
# even after 256 prompt tokens the first of the answer tell something new (0.77 and 0.75 after 32).
WARMUP_TARGET = 128
WARMUP_LEAST = 16
WARMUP_MOST = 64

# Beyond these llama.cpp ends the process (GGML_MAX_N_THREADS) or the binding cannot pass them on.
LLAMA_LIMITS = {
    "n_threads": 512,
    "n_threads_batch": 512,
    "n_batch": 2**31 - 1,
    "n_ubatch": 2**31 - 1,
}

# The ggml types that llama.cpp keeps keys and values in.
CACHE_TYPES = (
    llama_cpp.GGML_TYPE_F32,
    llama_cpp.GGML_TYPE_F16,
    30,  # BF16, which the binding has no name for
    llama_cpp.GGML_TYPE_Q8_0,
    llama_cpp.GGML_TYPE_Q4_0,
    llama_cpp.GGML_TYPE_Q4_1,
    llama_cpp.GGML_TYPE_IQ4_NL,
    llama_cpp.GGML_TYPE_Q5_0,
    llama_cpp.GGML_TYPE_Q5_1,
)

# What earlier turns weigh against the tokens of this one.
TURN_DECAY = 0.5


@dataclass(frozen=True)
class Figures:
    """What one call of ``generate``, ``stream`` or ``chat`` took.

    Attributes:
        prompt_tokens: tokens of the prompt, those found in the cache included.
        completion_tokens: tokens generated.
        warmup_tokens: how many of those were decoded dense, to add to the statistics.
        strategy: how the core set was chosen.
        density: fraction of FFN neurons in use at the end, averaged over the layers.
        prefill_seconds: evaluating the prompt.
        choose_seconds: choosing and gathering the core set.
        decode_seconds: all tokens after the first, sampling included.
        decode_tokens_per_second: their rate, warm-up included.
        core_tokens_per_second: the rate of those decoded with the core set, 0 if there were none.
        core_ffn_bytes: FFN weights read per token at the end.
        full_ffn_bytes: FFN weights of the model.
        peak_memory_bytes: highest resident memory of this process so far.
    """

    prompt_tokens: int
    completion_tokens: int
    warmup_tokens: int
    strategy: str
    density: float
    prefill_seconds: float
    choose_seconds: float
    decode_seconds: float
    decode_tokens_per_second: float
    core_tokens_per_second: float
    core_ffn_bytes: int
    full_ffn_bytes: int
    peak_memory_bytes: int


class _Phase(Enum):
    IDLE = auto()  # evaluations that are not ours to steer: dense, nothing collected
    PREFILL = auto()
    WARMUP = auto()
    CORE = auto()


@dataclass
class _Run:
    """What one run of ``generate`` does and takes; the source of its ``Figures``."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    warmup_tokens: int = 0
    warmup_left: int = 0
    core_tokens: int = 0
    density: float = 1.0
    core_bytes: int = 0
    prefill_seconds: float = 0.0
    choose_seconds: float = 0.0
    decode_seconds: float = 0.0
    core_seconds: float = 0.0


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


class CoreLlama(llama_cpp.Llama):
    """llama_cpp.Llama whose ``generate`` decodes with a core set.

    Everything built on ``generate`` (completions, chat, server) gets the core path; evaluating by
    hand stays dense. Arguments beyond those of ``llama_cpp.Llama``:

    Args:
        density: fraction of FFN neurons to keep, averaged over the layers.
        strategy: one of STRATEGIES.
        warmup: number of generated tokens to decode dense first, or ``"auto"``.
        files: the GGUF files of the model.
    """

    def __init__(
        self,
        *,
        density: float,
        strategy: str,
        warmup: int | Literal["auto"],
        files: Sequence[Path],
        **llama_kwargs: Any,
    ) -> None:
        self._core: CoreContext | None = None
        self._phase = _Phase.IDLE
        self.lock = threading.RLock()  # one thread at a time computes
        if llama_kwargs.get("draft_model") is not None:
            # the binding keeps the logits of all tokens then, in an array that must have the room
            llama_kwargs["logits_all"] = True
        super().__init__(**llama_kwargs)
        # llama.cpp rounds the context up; the binding's own arrays are as long as was asked for
        self._n_ctx = min(self._n_ctx, len(self.input_ids))
        self._density = density
        self._warmup = warmup
        self._down_norms: list[Floats] = []
        self._history = _History()
        self.run = _Run()
        try:
            if self.lora_path and not self._lora_adapter:
                # the binding misses that the pointer is NULL, and evaluating would end the process
                raise RuntimeError(f"failed to load the LoRA adapter {self.lora_path}")
            if strategy != "dense" and density < 1.0:
                self._core = CoreContext(self.ctx, files, self.n_threads_batch)
                self._down_norms = self._core.down_norms()  # now, while the file is in the cache
        except BaseException:
            self.close()  # or the model would live as long as the exception
            raise

    def close(self) -> None:
        """Free the model, the context and the core set."""
        super().close()
        if self._core is not None:
            self._core.close()
            self._core = None

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """As ``llama_cpp.Llama.generate``: pre-fill dense, choose, decode with the core set."""
        if len(tokens) == 0:
            raise ArgumentError("the prompt has no tokens: give at least one")
        if len(tokens) > self._n_ctx:
            raise _prompt_too_long(len(tokens), self._n_ctx)
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
                sent = yield token
        finally:
            steps.close()
            self._end(run)

    def _begin(self, prompt: list[int]) -> _Run:
        self.run = _Run(prompt_tokens=len(prompt))
        self._phase = _Phase.PREFILL
        if self._core is not None:
            if not self._history.start(prompt) and self.cache is None:
                # Evaluate all of it: of tokens found in the KV cache there would be no statistics.
                # What a LlamaRAMCache brings back stays without; warm-up makes up for it.
                self.reset()  # type: ignore[no-untyped-call]
            self._core.clear_statistics()
            self._core.collect(True)
            self._core.use_core(False)
        return self.run

    def eval(self, tokens: Sequence[int]) -> None:
        """As ``llama_cpp.Llama.eval``, dense or with the core set as the phase asks."""
        if self._phase is _Phase.PREFILL:
            start = time.perf_counter()
            super().eval(tokens)
            llama_cpp.llama_synchronize(self.ctx)
            self.run.prefill_seconds = time.perf_counter() - start
            self._phase = _Phase.WARMUP
            if self._core is not None:
                statistics = self._history.prefilled(self._core.statistics())
                self._core.clear_statistics()
                self.run.warmup_left = self._warmup_tokens(float(statistics.n_tokens.max()))
            return
        if self._phase is _Phase.WARMUP and self._core is not None:
            if self.run.warmup_left > 0:
                self.run.warmup_left -= len(tokens)
                self.run.warmup_tokens += len(tokens)
            else:
                self._fix(self._core)
                self._phase = _Phase.CORE
        super().eval(tokens)

    def _warmup_tokens(self, seen: float) -> int:
        """How many tokens to decode dense, given the number of tokens in the statistics."""
        if self._warmup == "auto":
            return max(WARMUP_LEAST, min(WARMUP_MOST, round(WARMUP_TARGET - seen)))
        return self._warmup if seen >= 1 else max(1, self._warmup)

    def _statistics(self, core: CoreContext) -> Statistics:
        """Of the prompt, what it carries on, and the tokens of the warm-up."""
        decoded = core.statistics()
        prompt = self._history.at_prompt
        return decoded if prompt is None else decoded.plus(prompt, 1.0)

    def _fix(self, core: CoreContext) -> None:
        """Choose the core set from the statistics so far, gather it, and decode with it."""
        start = time.perf_counter()
        scores, fills = energy(self._statistics(core), self._down_norms)
        ends = (0, llama_cpp.llama_model_n_layer(self.model) - 1)
        dense = [i for i, ffn in enumerate(core.ffns) if ffn.layer in ends]
        densities = layer_densities(len(core.ffns), self._density, dense)
        chosen = choose(scores, fills, list(densities))
        core.collect(False)
        core.set_core(chosen)
        core.use_core(True)
        shares = [
            len(chosen[i].neurons) / ffn.n_ff if i in chosen else 1.0
            for i, ffn in enumerate(core.ffns)
        ]
        self.run.density = sum(shares) / len(shares)
        self.run.core_bytes = core.core_bytes
        self.run.choose_seconds += time.perf_counter() - start

    def _end(self, run: _Run) -> None:
        if self.run is not run:
            return  # a generator dropped earlier and collected only now: another run is under way
        self._phase = _Phase.IDLE
        if self._core is not None:
            self._history.end(self._input_ids.tolist(), self._statistics(self._core))
            self._core.collect(False)
            self._core.use_core(False)


class EdgeLLM:
    """A GGUF model that decodes with its core neurons (CoreInfer, arXiv 2410.18311).

    Each prompt is pre-filled dense while the activations of its FFN neurons are watched; the
    neurons that matter for it become its core set, gathered into compact tensors; the answer is
    decoded with those.

    One EdgeLLM computes for one thread at a time: a call waits for that of another thread, and ends
    a stream that is still open. Several can live side by side.

    Args:
        path: the GGUF file (of a split one, the first), ``"demo"``, or an ``hf://`` address as
            ``model_source.resolve`` describes them.
        density: fraction of FFN neurons to keep, averaged over the layers, in (0, 1]. 1.0 is dense.
        strategy: how the core set is chosen: ``"energy"``, or ``"dense"`` for none at all.
        warmup: generated tokens to decode dense while statistics go on being collected, or
            ``"auto"``: few for a long prompt, up to 64 for a short one.
        memory: not available yet; None.
        n_gpu_layers: layers to place on the GPU, as in llama-cpp-python.
        n_ctx: context in tokens; by default the model's own, at most 4096.
        seed: for sampling.
        verbose: let llama.cpp log to standard error.
        **llama_kwargs: any other argument of ``llama_cpp.Llama``.

    Raises:
        ModelFileError: the file is missing, damaged or no GGUF.
        UnsupportedModelError: llama.cpp does not know the model, or it has no dense FFN.
        ArgumentError: an argument is outside what it may be.
        InsufficientMemoryError: model or context do not fit.

    Example:
        >>> with EdgeLLM("model.gguf", density=0.4) as llm:
        ...     print(llm.generate("The capital of France is"))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        density: float = 0.5,
        strategy: str = "energy",
        warmup: int | Literal["auto"] = "auto",
        memory: None = None,
        n_gpu_layers: int = 0,
        n_ctx: int | None = None,
        seed: int = llama_cpp.LLAMA_DEFAULT_SEED,
        verbose: bool = False,
        **llama_kwargs: Any,
    ) -> None:
        _check_arguments(density, strategy, warmup, memory, n_ctx)
        _check_llama_arguments(llama_kwargs)
        path = resolve(path)
        header = _overridden(read_header(path), llama_kwargs.get("kv_overrides"))
        check_loadable(header)
        self.strategy = strategy if density < 1.0 else "dense"
        if lora := llama_kwargs.get("lora_path"):
            _check_lora(lora, self.strategy)
            llama_kwargs["lora_path"] = os.fspath(lora)
        if n_gpu_layers and not llama_cpp.llama_supports_gpu_offload():
            warnings.warn(
                "this build has no GPU backend, so n_gpu_layers does nothing: see README, Install",
                RuntimeWarning,
                stacklevel=2,
            )
        if n_ctx is None:
            n_ctx = min(DEFAULT_CONTEXT, _trained_context(header))
        _check_context_memory(header, n_ctx, {**llama_kwargs, "n_gpu_layers": n_gpu_layers})
        self._ffn_bytes = sum(
            tensor.n_bytes
            for name, tensor in header.tensors.items()
            if re.fullmatch(r"blk\.\d+\.ffn_(up|gate|down)\.(weight|bias)", name)
        )
        self._llama: CoreLlama | None = None
        self._last: Figures | None = None
        with _load_errors(header, verbose):
            self._llama = CoreLlama(
                density=density,
                strategy=self.strategy,
                warmup=warmup,
                files=header.files,
                model_path=str(path),
                n_gpu_layers=n_gpu_layers,
                n_ctx=n_ctx,
                seed=seed,
                verbose=verbose,
                **llama_kwargs,
            )

    @property
    def llama(self) -> CoreLlama:
        """The ``llama_cpp.Llama`` underneath, for everything that EdgeLLM has no method for."""
        if self._llama is None:
            raise ArgumentError("this EdgeLLM is closed: make a new one")
        return self._llama

    @property
    def last(self) -> Figures | None:
        """The figures of the last call; None before the first, and after one that was refused."""
        return self._last

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int | None = 128,
        temperature: float = 0.8,
        stop: str | list[str] | None = None,
        **sampling: Any,
    ) -> str:
        """Continue a prompt.

        Args:
            prompt: text, or its tokens. An empty one starts from the beginning-of-text token.
            max_tokens: at most this many; None or 0 for as many as the context holds.
            temperature: 0 always takes the most likely token.
            stop: text that ends the answer and is not part of it.
            **sampling: any other argument of ``llama_cpp.Llama.create_completion`` (``top_p``,
                ``top_k``, ``seed``, ``grammar``, ...).

        Returns:
            The text that follows the prompt.

        Raises:
            PromptTooLongError: the prompt does not fit into the context.
        """
        _check_not_stream(sampling)
        with self.llama.lock, self._call():
            answer: Any = self.llama.create_completion(
                self._prompt(prompt),
                max_tokens=max_tokens,
                temperature=temperature,
                stop=_stop_texts(stop),
                **sampling,
            )
        return str(answer["choices"][0]["text"])

    def stream(
        self,
        prompt: str | Sequence[int],
        max_tokens: int | None = 128,
        temperature: float = 0.8,
        stop: str | list[str] | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """As ``generate``, yielding the text piece by piece. The next call ends the stream."""
        _check_not_stream(sampling)
        with self._call():
            chunks: Any = self.llama.create_completion(
                self._prompt(prompt),
                max_tokens=max_tokens,
                temperature=temperature,
                stop=_stop_texts(stop),
                stream=True,
                **sampling,
            )
            for chunk in chunks:
                if piece := chunk["choices"][0]["text"]:
                    yield str(piece)

    @overload
    def chat(
        self,
        messages: list[dict[str, Any]],
        max_tokens: int | None = ...,
        temperature: float = ...,
        stop: str | list[str] | None = ...,
        *,
        stream: Literal[False] = ...,
        **sampling: Any,
    ) -> str: ...

    @overload
    def chat(
        self,
        messages: list[dict[str, Any]],
        max_tokens: int | None = ...,
        temperature: float = ...,
        stop: str | list[str] | None = ...,
        *,
        stream: Literal[True],
        **sampling: Any,
    ) -> Iterator[str]: ...

    def chat(
        self,
        messages: list[dict[str, Any]],
        max_tokens: int | None = None,
        temperature: float = 0.8,
        stop: str | list[str] | None = None,
        *,
        stream: bool = False,
        **sampling: Any,
    ) -> str | Iterator[str]:
        """Answer a conversation, with the model's chat template.

        Args:
            messages: ``{"role": "system" | "user" | "assistant", "content": ...}`` in order.
            max_tokens: at most this many; None for as many as the context holds.
            temperature: 0 always takes the most likely token.
            stop: text that ends the answer and is not part of it.
            stream: yield the answer piece by piece.
            **sampling: any other argument of ``llama_cpp.Llama.create_chat_completion``
                (``response_format``, ``tools``, ``grammar``, ...).

        Returns:
            The answer, or an iterator over its pieces.

        Raises:
            PromptTooLongError: the conversation does not fit into the context.
        """
        if not messages:
            raise ArgumentError("messages is empty: give at least one message")
        arguments = dict(
            sampling,
            messages=messages,
            max_tokens=max_tokens,
            temperature=temperature,
            stop=_stop_texts(stop),
        )
        if stream:
            return self._stream_chat(arguments)
        with self.llama.lock, self._call():
            answer: Any = self.llama.create_chat_completion(**arguments)
        return str(answer["choices"][0]["message"]["content"] or "")

    def _stream_chat(self, arguments: Mapping[str, Any]) -> Iterator[str]:
        with self._call():
            chunks: Any = self.llama.create_chat_completion(stream=True, **arguments)
            for chunk in chunks:
                if piece := chunk["choices"][0]["delta"].get("content"):
                    yield str(piece)

    def close(self) -> None:
        """Free the model; calling it again does nothing."""
        if self._llama is not None:
            self._llama.close()
            self._llama = None

    def __enter__(self) -> EdgeLLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _prompt(self, prompt: str | Sequence[int]) -> str | list[int]:
        if isinstance(prompt, str) and prompt:
            return prompt
        try:
            tokens = [operator.index(token) for token in prompt]  # type: ignore[arg-type]
        except TypeError as error:
            raise ArgumentError("the prompt must be text or a list of token numbers") from error
        if tokens:
            n_vocab = self.llama.n_vocab()
            for token in tokens:
                if not 0 <= token < n_vocab:
                    raise ArgumentError(f"token {token} is none of the model's {n_vocab} tokens")
            return tokens
        bos = self.llama.token_bos()
        return [bos if bos >= 0 else self.llama.token_eos()]

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Around every use of the model: errors become ours, and figures are kept."""
        before = self.llama.run
        self._last = None
        try:
            yield
        except CoreInferError:
            raise
        except UnicodeEncodeError as error:
            raise ArgumentError(f"the prompt holds what is no text: {error}") from error
        except _REFUSALS as error:
            # the binding has no class of its own for this
            too_long = re.match(r"Requested tokens \((\d+)\) exceed context window", str(error))
            if too_long:
                raise _prompt_too_long(int(too_long[1]), len(self.llama.input_ids)) from error
            raise ArgumentError(f"llama_cpp refuses the arguments: {error}") from error
        except RuntimeError as error:
            raise NativeError(f"llama.cpp failed: {error}") from error
        finally:
            if self._llama is not None and self._llama.run is not before:
                self._last = self._figures(self._llama.run)

    def _figures(self, run: _Run) -> Figures:
        decoded = max(0, run.completion_tokens - 1)
        return Figures(
            prompt_tokens=run.prompt_tokens,
            completion_tokens=run.completion_tokens,
            warmup_tokens=run.warmup_tokens,
            strategy=self.strategy,
            density=run.density,
            prefill_seconds=run.prefill_seconds,
            choose_seconds=run.choose_seconds,
            decode_seconds=run.decode_seconds,
            decode_tokens_per_second=_rate(decoded, run.decode_seconds),
            core_tokens_per_second=_rate(run.core_tokens, run.core_seconds),
            core_ffn_bytes=run.core_bytes or self._ffn_bytes,
            full_ffn_bytes=self._ffn_bytes,
            peak_memory_bytes=_peak_memory(),
        )


def _prompt_too_long(n_tokens: int, n_ctx: int) -> PromptTooLongError:
    return PromptTooLongError(
        f"a prompt of {n_tokens} tokens and an answer do not fit into the context of {n_ctx}:"
        " shorten it, or give a larger n_ctx"
    )


def _check_not_stream(sampling: Mapping[str, Any]) -> None:
    if "stream" in sampling:
        raise ArgumentError("stream is no argument here: call EdgeLLM.stream for pieces of text")


def _stop_texts(stop: str | list[str] | None) -> list[str]:
    """Empty texts left out: they would end every answer at once."""
    texts = [stop] if isinstance(stop, str) else stop or []
    return [text for text in texts if text]


def _rate(n: int, seconds: float) -> float:
    return n / seconds if n and seconds > 0 else 0.0


def _peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _check_arguments(
    density: float, strategy: str, warmup: int | str, memory: object, n_ctx: int | None
) -> None:
    if isinstance(density, bool) or not isinstance(density, Real) or not 0 < density <= 1:
        raise ArgumentError(
            f"density is {density!r}: it must be above 0 and at most 1 (1 is dense)"
        )
    if strategy not in STRATEGIES:
        raise ArgumentError(f"strategy is {strategy!r}: it must be one of {', '.join(STRATEGIES)}")
    if warmup != "auto" and (isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0):
        raise ArgumentError(f"warmup is {warmup!r}: it must be 'auto' or a number of tokens")
    if memory is not None:
        raise ArgumentError("memory is not available yet: leave it out")
    if n_ctx is not None and (
        isinstance(n_ctx, bool) or not isinstance(n_ctx, int) or not 0 < n_ctx < 2**31
    ):
        raise ArgumentError(
            f"n_ctx is {n_ctx!r}: it must be a number of tokens from 1 to 2147483647"
        )


# What the binding raises for arguments that it cannot use.
_REFUSALS = (
    AssertionError,
    AttributeError,
    TypeError,
    ValueError,
    ctypes.ArgumentError,
    LlamaChatCompletionHandlerNotFoundException,
)


def _overridden(header: GGUFHeader, overrides: Mapping[str, Any] | None) -> GGUFHeader:
    """The header as llama.cpp will see it, so that the checks see it too."""
    if overrides is None:
        return header
    if not isinstance(overrides, dict) or not all(isinstance(key, str) for key in overrides):
        raise ArgumentError("kv_overrides must be a dict from metadata keys to values")
    return replace(header, metadata={**header.metadata, **overrides})


def _check_llama_arguments(arguments: Mapping[str, Any]) -> None:
    """The binding ignores what it does not know; a slip of the pen should not go unseen."""
    known = inspect.signature(llama_cpp.Llama.__init__).parameters
    for name in arguments:
        if name not in known or name in ("self", "kwargs", "model_path"):
            raise ArgumentError(f"{name} is no argument of EdgeLLM or of llama_cpp.Llama")
    for name, most in LLAMA_LIMITS.items():
        value = arguments.get(name)
        if value is not None and not (isinstance(value, int) and 1 <= value <= most):
            raise ArgumentError(f"{name} is {value!r}: it must be a number from 1 to {most}")
    for name in ("type_k", "type_v"):
        if arguments.get(name) not in (None, *CACHE_TYPES):
            raise ArgumentError(
                f"{name} is {arguments[name]!r}: it must be one of the ggml types"
                f" {', '.join(map(str, CACHE_TYPES))}"
            )
    if arguments.get("vocab_only"):
        raise ArgumentError("vocab_only leaves no model to generate with: use llama_cpp.Llama")


def _check_lora(path: str | os.PathLike[str], strategy: str) -> None:
    """Refuse what is no adapter, and one of the FFN, whose change compact tensors would miss."""
    header = read_header(path)
    if header.get("general.type") != "adapter":
        raise ModelFileError(f"{path} is no LoRA adapter in GGUF form: give lora_path one")
    changed = sorted(name for name in header.tensors if ".ffn_" in name)
    if changed and strategy != "dense":
        raise UnsupportedModelError(
            f"the LoRA adapter {path} changes FFN weights ({changed[0]}), which a core set does not"
            " carry: merge it into the model (llama-export-lora), or use strategy='dense'"
        )


def _trained_context(header: GGUFHeader) -> int:
    n_ctx = header.of_architecture("context_length")
    return n_ctx if isinstance(n_ctx, int) and n_ctx > 0 else DEFAULT_CONTEXT


def _check_context_memory(header: GGUFHeader, n_ctx: int, arguments: Mapping[str, Any]) -> None:
    """Refuse a context whose cache cannot fit; the system would end the process instead."""
    if arguments.get("n_gpu_layers"):
        return  # it need not be in this memory
    # at least: a quantised cache takes a quarter
    bytes_each = 2.0 if arguments.get("type_k") is arguments.get("type_v") is None else 0.5
    n_bytes = int(n_ctx * _cached_numbers_per_token(header) * bytes_each)
    available = psutil.virtual_memory().available
    if n_bytes > available:
        raise InsufficientMemoryError(
            f"a context of {n_ctx} tokens needs about {n_bytes >> 20} MiB for its cache, and"
            f" {available >> 20} MiB of memory are available: give a smaller n_ctx"
        )


def _cached_numbers_per_token(header: GGUFHeader) -> int:
    """Keys and values per token, or 0 where the architecture keeps fewer than all of them."""

    def number(key: str) -> int:
        value = header.of_architecture(key)
        return value if isinstance(value, int) else 0

    n_head, n_head_kv = number("attention.head_count"), number("attention.head_count_kv")
    if not n_head or any(
        header.of_architecture(key) is not None
        for key in ("attention.sliding_window", "attention.kv_lora_rank", "ssm.state_size")
    ):
        return 0
    if not n_head_kv:
        if header.of_architecture("attention.head_count_kv") is not None:
            return 0  # a list: not the same in all layers
        n_head_kv = n_head
    width = number("embedding_length") // n_head
    key, value = number("attention.key_length"), number("attention.value_length")
    return header.n_layers * n_head_kv * ((key or width) + (value or width))


@contextmanager
def _load_errors(header: GGUFHeader, verbose: bool) -> Iterator[None]:
    """Turn what llama.cpp logs when it cannot load a model into an error of ours."""
    with captured_log(echo=verbose) as log:
        try:
            yield
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{header.path}: {error}: run it with strategy='dense'"
            ) from error
        except MemoryError as error:
            raise InsufficientMemoryError(_no_memory(header, str(error))) from error
        except CoreInferError:
            raise
        except (*_REFUSALS, RuntimeError) as error:
            lines = [line.strip() for line in log if line.strip()]
            reasons = [line for line in lines if re.search("error|fail|unable|require", line)]
            reason = "; ".join(dict.fromkeys(reasons)) or str(error)
            if re.search("allocat|out of memory", reason):
                raise InsufficientMemoryError(_no_memory(header, reason)) from error
            if re.search("load.* model|vocab|LoRA", str(error)):
                raise ModelFileError(f"{header.path} cannot be loaded: {reason}") from error
            raise ArgumentError(
                f"{header.path} cannot be run with these arguments: {reason}"
            ) from error


def _no_memory(header: GGUFHeader, reason: str) -> str:
    return (
        f"not enough memory to run {header.path} ({header.file_size >> 20} MiB): {reason}:"
        " give a smaller n_ctx or density, or choose a smaller model"
    )
