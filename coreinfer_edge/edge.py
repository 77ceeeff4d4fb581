"""EdgeLLM: pre-fill dense, fix a core set of neurons per layer, decode with only those."""

from __future__ import annotations

import ctypes
import operator
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import psutil

if sys.platform != "win32":
    import resource

from coreinfer_edge.arguments import (
    check_arguments,
    check_context_memory,
    check_llama_arguments,
    check_lora,
    check_positions,
    default_context,
    given_layers,
    overridden,
)
from coreinfer_edge.core_llama import NOT_COPYABLE, CoreLlama, Run, prompt_too_long
from coreinfer_edge.errors import (
    ArgumentError,
    CoreInferError,
    InsufficientMemoryError,
    MemoryBudgetError,
    ModelFileError,
    NativeError,
    NotCopyableError,
    UnsupportedModelError,
)
from coreinfer_edge.gguf_header import GGUFHeader, read_header
from coreinfer_edge.llama_log import captured_log
from coreinfer_edge.loadable import check_loadable
from coreinfer_edge.model_source import resolve
from coreinfer_edge.native import llama_cpp
from coreinfer_edge.prior import from_header

if TYPE_CHECKING:
    from coreinfer_edge.memory_plan import MemoryPlan


class _Call:
    """One use of a model, and the run that it began.

    Attributes:
        run: None as long as there is none.
    """

    def __init__(self, llama: CoreLlama) -> None:
        self._llama = llama
        self.run: Run | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around what may begin the run; the lock must be held."""
        before = self._llama.run
        try:
            yield
        finally:
            if self._llama.run is not before:
                self.run = self._llama.run


@dataclass(frozen=True)
class Figures:
    """What one call of ``generate``, ``stream`` or ``chat`` took.

    Attributes:
        prompt_tokens: tokens of the prompt, those found in the cache included.
        completion_tokens: tokens generated.
        warmup_tokens: how many of those were decoded dense, to add to the statistics.
        strategy: how the core set was chosen.
        density: fraction of FFN neurons in use at the end, averaged over the layers.
        estimated_kl: what ``density="auto"`` expects the density to cost on this prompt: KL
            divergence from dense to core in nats per token; None for a density that was given.
        prefill_seconds: evaluating the prompt.
        choose_seconds: choosing and gathering the core set.
        decode_seconds: all tokens after the first, sampling and refreshing included.
        decode_tokens_per_second: their rate, warm-up included.
        core_tokens_per_second: the rate of those decoded with the core set, 0 if there were none.
        refreshes: how often the core set was chosen again.
        refresh_seconds: evaluating, choosing and gathering for that.
        core_ffn_bytes: FFN weights read per token at the end.
        full_ffn_bytes: FFN weights of the model.
        repacked_bytes: copies of other weights that were multiplied with (``repack``).
        peak_memory_bytes: highest resident memory of this process so far.
        streamed_bytes: FFN weights read from the file because they are not in memory.
        stream_seconds: reading them took.
        stream_waited_seconds: how long of that computing had to wait.
        major_faults: page faults that read from a disk, while decoding with the core set.
        peak_private_bytes: most private memory during this call, with ``memory`` only; else 0.
    """

    prompt_tokens: int
    completion_tokens: int
    warmup_tokens: int
    strategy: str
    density: float
    estimated_kl: float | None
    prefill_seconds: float
    choose_seconds: float
    decode_seconds: float
    decode_tokens_per_second: float
    core_tokens_per_second: float
    refreshes: int
    refresh_seconds: float
    core_ffn_bytes: int
    full_ffn_bytes: int
    repacked_bytes: int
    peak_memory_bytes: int
    streamed_bytes: int
    stream_seconds: float
    stream_waited_seconds: float
    major_faults: int
    peak_private_bytes: int


class EdgeLLM:
    """A GGUF model that decodes with its core neurons (CoreInfer, arXiv 2410.18311).

    Each prompt is pre-filled dense while the activations of its FFN neurons are watched; the
    neurons that matter for it become its core set, gathered into compact tensors; the answer is
    decoded with those.

    One EdgeLLM computes for one thread at a time: a call waits for that of another thread, and ends
    a stream that is still open, whose next piece then raises ArgumentError. Several can live side
    by side. The same call gives the same text, whatever was asked before, if it has a seed or
    temperature 0. After a fork the child cannot use it: load the model there.

    Args:
        path: the GGUF file (of a split one, the first), ``"demo"``, or an ``hf://`` address as
            ``model_source.resolve`` describes them.
        density: fraction of FFN neurons to keep, averaged over the layers, in (0, 1]. 1.0 is dense.
            ``"auto"``: for each prompt the smallest that keeps to ``quality``. By default 0.5, or,
            in a memory that the model does not fit, the largest that does.
        strategy: how the core set is chosen: ``"energy"``, ``"stability"``, ``"similarity"``,
            ``"griffin"``, ``"static"`` (see ``coreinfer_edge.strategies``), or ``"dense"`` for none
            at all. ``"similarity"`` and ``"static"`` need a model with statistics from calibration.
        warmup: generated tokens to decode dense while statistics go on being collected, or
            ``"auto"``: few for a long prompt, up to 64 for a short one, and none if the FFN weights
            are not in memory: each of these tokens then reads them all.
        memory: the private memory that this process may have: ``"1.5GiB"``, ``"800MB"``, a number
            of bytes, or ``"auto"`` for what is available here, less a tenth. If the model does not
            fit, the weights of its FFNs stay in the file: pre-fill reads them layer by layer, and
            decoding has the core set in memory. On the CPU only, and on Linux only.
        quality: for ``density="auto"``: the KL divergence from dense to core to keep to, in nats
            per token, as estimated on the last tokens before the choice.
        layers: the layers that stay dense, or the densities of some layers by number; negative
            numbers count from the end. The others share what is left of the density. By default
            ``"energy"`` and ``"static"`` keep the first and the last, where the density allows it.
        refresh: after so many tokens of the core set evaluate them once more dense, in one batch,
            and choose again; None for never.
        repack: while decoding with a core set, multiply the other weights too (attention, output,
            dense layers) by our own kernels, from a copy: faster than llama.cpp's on x86 processors
            with AVX2 (for Q8_0: AVX-512 VNNI). They round differently, so that the text can differ
            after some tokens. By default where memory for the whole model once more is available,
            and not with ``memory``.
        n_gpu_layers: layers to place on the GPU, as in llama-cpp-python.
        n_ctx: context in tokens; by default the model's own, at most 4096.
        seed: for sampling.
        verbose: let llama.cpp log to standard error.
        **llama_kwargs: any other argument of ``llama_cpp.Llama``.

    Raises:
        ModelFileError: the file is missing, damaged or no GGUF.
        UnsupportedModelError: llama.cpp does not know the model, or it has no dense FFN.
        ArgumentError: an argument is outside what it may be.
        InsufficientMemoryError: model or context do not fit, or not into ``memory``.

    Example:
        >>> with EdgeLLM("model.gguf", density=0.4) as llm:
        ...     print(llm.generate("The capital of France is"))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        density: float | Literal["auto"] | None = None,
        strategy: str = "energy",
        warmup: int | Literal["auto"] = "auto",
        memory: int | str | None = None,
        n_gpu_layers: int = 0,
        n_ctx: int | None = None,
        seed: int = llama_cpp.LLAMA_DEFAULT_SEED,
        verbose: bool = False,
        quality: float = 0.25,
        layers: Iterable[int] | Mapping[int, float] | None = None,
        refresh: int | None = None,
        repack: bool | None = None,
        **llama_kwargs: Any,
    ) -> None:
        wanted, density = density, 0.5 if density is None else density
        check_arguments(density, strategy, warmup, n_ctx, quality, refresh)
        if repack is not None and not isinstance(repack, bool):
            raise ArgumentError(f"repack is {repack!r}: it must be True, False or None")
        if memory is not None:
            from coreinfer_edge.memory_plan import parse_size

            if memory != "auto":
                parse_size(memory)
            if repack:
                raise ArgumentError("repack does not go with memory: it needs a copy of weights")
            repack = False
        layers = given_layers(layers, density)
        check_llama_arguments(llama_kwargs)
        path = resolve(path)
        header = overridden(read_header(path), llama_kwargs.get("kv_overrides"))
        check_loadable(header)
        self.strategy = "dense" if density == 1.0 else strategy
        prior = None if self.strategy == "dense" else from_header(header)
        if lora := llama_kwargs.get("lora_path"):
            check_lora(lora, self.strategy, header)
            llama_kwargs["lora_path"] = os.fspath(lora)
        if n_gpu_layers and not llama_cpp.llama_supports_gpu_offload():
            warnings.warn(
                "this build has no GPU backend, so n_gpu_layers does nothing: see README, Install",
                RuntimeWarning,
                stacklevel=2,
            )
        if n_ctx is None:
            n_ctx = default_context(header)
        check_positions(header, n_ctx)
        check_context_memory(header, n_ctx, {**llama_kwargs, "n_gpu_layers": n_gpu_layers})
        self._ffn_bytes = sum(
            tensor.n_bytes
            for name, tensor in header.tensors.items()
            if re.fullmatch(r"blk\.\d+\.ffn_(up|gate|down)\.(weight|bias)", name)
        )
        self._llama: CoreLlama | None = None
        self._last: Figures | None = None
        self._plan: MemoryPlan | None = None
        llama_kwargs.update(model_path=str(path), n_gpu_layers=n_gpu_layers, n_ctx=n_ctx, seed=seed)
        with _load_errors(header, verbose):
            placement, most_density = None, 1.0
            if memory is not None:
                from coreinfer_edge.memory_plan import Planner

                planner = Planner(
                    header, memory, wanted, self.strategy, layers, prior, llama_kwargs
                )
                self._plan = plan = planner.plan()
                placement = planner.placement(plan)
                llama_kwargs["n_batch"] = llama_kwargs["n_ubatch"] = plan.n_batch
                most_density = plan.density
                density = density if density == "auto" else plan.density
            self._llama = CoreLlama(
                density=density,
                quality=quality,
                strategy=self.strategy,
                layers=layers,
                refresh=refresh,
                warmup=warmup,
                files=header.files,
                prior=prior,
                placement=placement,
                most_density=most_density,
                repack=repack,
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
    def plan(self) -> MemoryPlan | None:
        """What was planned for ``memory``; None without."""
        return self._plan

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
        with self.llama.lock, self._call() as call, call.watched():
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

        def start() -> Any:
            return self.llama.create_completion(
                self._prompt(prompt),
                max_tokens=max_tokens,
                temperature=temperature,
                stop=_stop_texts(stop),
                stream=True,
                **sampling,
            )

        return self._stream(start, lambda choice: choice["text"])

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
        with self.llama.lock, self._call() as call, call.watched():
            answer: Any = self.llama.create_chat_completion(**arguments)
        return str(answer["choices"][0]["message"]["content"] or "")

    def _stream_chat(self, arguments: Mapping[str, Any]) -> Iterator[str]:
        return self._stream(
            lambda: self.llama.create_chat_completion(stream=True, **arguments),
            lambda choice: choice["delta"].get("content"),
        )

    def _stream(
        self, start: Callable[[], Any], text_of: Callable[[Any], str | None]
    ) -> Iterator[str]:
        """The pieces of a stream; the lock is held only while one of them is computed."""
        llama = self.llama
        with self._call() as call:
            with llama.lock:
                chunks = start()
            while True:
                with llama.lock, call.watched():
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                if piece := text_of(chunk["choices"][0]):
                    yield str(piece)

    def close(self) -> None:
        """Free the model; calling it again does nothing.

        It waits for the evaluation that another thread has under way. A call or stream that would
        go on afterwards raises ArgumentError.
        """
        if (llama := self._llama) is not None:
            llama.close()
            self._llama = None

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise NotCopyableError(NOT_COPYABLE)

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
    def _call(self) -> Iterator[_Call]:
        """Around every use of the model: errors become ours, and figures are kept."""
        call = _Call(self.llama)
        self._last = None
        try:
            yield call
        except CoreInferError:
            raise
        except MemoryError as error:
            raise InsufficientMemoryError(
                f"out of memory: {error}: give a smaller n_ctx or density"
            ) from error
        except UnicodeEncodeError as error:
            raise ArgumentError(f"the prompt holds what is no text: {error}") from error
        except _REFUSALS as error:
            # the binding has no class of its own for this
            too_long = re.match(r"Requested tokens \((\d+)\) exceed context window", str(error))
            if too_long:
                raise prompt_too_long(int(too_long[1]), len(self.llama.input_ids)) from error
            raise ArgumentError(f"llama_cpp refuses the arguments: {error}") from error
        except RuntimeError as error:
            raise NativeError(f"llama.cpp failed: {error}") from error
        finally:
            if call.run is not None:
                self._last = self._figures(call.run)

    def _figures(self, run: Run) -> Figures:
        decoded = max(0, run.completion_tokens - 1)
        return Figures(
            prompt_tokens=run.prompt_tokens,
            completion_tokens=run.completion_tokens,
            warmup_tokens=run.warmup_tokens,
            strategy=self.strategy,
            density=run.density,
            estimated_kl=run.estimated_kl,
            prefill_seconds=run.prefill_seconds,
            choose_seconds=run.choose_seconds,
            decode_seconds=run.decode_seconds,
            decode_tokens_per_second=_rate(decoded, run.decode_seconds),
            core_tokens_per_second=_rate(run.core_tokens, run.core_seconds),
            refreshes=run.refreshes,
            refresh_seconds=run.refresh_seconds,
            core_ffn_bytes=run.core_bytes or self._ffn_bytes,
            full_ffn_bytes=self._ffn_bytes,
            repacked_bytes=run.repacked_bytes,
            peak_memory_bytes=_peak_memory(),
            streamed_bytes=run.streamed_bytes,
            stream_seconds=run.stream_seconds,
            stream_waited_seconds=run.stream_waited_seconds,
            major_faults=run.core_faults,
            peak_private_bytes=run.peak_private,
        )


def plan_memory(
    path: str | os.PathLike[str],
    memory: int | str,
    density: float | Literal["auto"] | None = None,
    strategy: str = "energy",
    n_ctx: int | None = None,
    **llama_kwargs: Any,
) -> MemoryPlan:
    """What ``EdgeLLM(path, memory=memory, ...)`` would do, without loading the model.

    Raises:
        MemoryBudgetError: it would not fit; says what would.
        CoreInferError: as EdgeLLM raises.
    """
    from coreinfer_edge.memory_plan import Planner

    check_arguments(0.5 if density is None else density, strategy, 0, n_ctx, 1.0, None)
    check_llama_arguments(llama_kwargs)
    path = resolve(path)
    header = read_header(path)
    check_loadable(header)
    strategy = "dense" if density == 1.0 else strategy
    llama_kwargs.update(model_path=str(path), n_ctx=n_ctx or default_context(header))
    with _load_errors(header, verbose=False):
        return Planner(
            header, memory, density, strategy, None, from_header(header), llama_kwargs
        ).plan()


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


# What the binding raises for arguments that it cannot use.
_REFUSALS = (
    AssertionError,
    AttributeError,
    TypeError,
    ValueError,
    ctypes.ArgumentError,
    llama_cpp.llama_chat_format.LlamaChatCompletionHandlerNotFoundException,
)


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
        except MemoryBudgetError:
            raise
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
