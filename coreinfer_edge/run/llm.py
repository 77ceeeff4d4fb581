"""EdgeLLM: pre-fill dense, fix a core set of neurons per layer, decode with only those."""

from __future__ import annotations

import operator
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

from coreinfer_edge.binding.core import has_device
from coreinfer_edge.choose.prior import from_header
from coreinfer_edge.choose.statistics import Level
from coreinfer_edge.errors import (
    ArgumentError,
    CoreInferError,
    InsufficientMemoryError,
    NativeError,
    NotCopyableError,
    UnsupportedModelError,
)
from coreinfer_edge.model.chat_templates import check_chat_format
from coreinfer_edge.model.ffn import dense_ffn
from coreinfer_edge.model.loadable import check_loadable
from coreinfer_edge.model.source import header_of
from coreinfer_edge.run.arguments import (
    check_llama_arguments,
    check_lora,
    check_positions,
    default_context,
    overridden,
)
from coreinfer_edge.run.chat_request import ChatRequest, chat_request, tools_wanted
from coreinfer_edge.run.core_llama import NOT_COPYABLE, Asked, CoreLlama, prompt_too_long
from coreinfer_edge.run.figures import Figures
from coreinfer_edge.run.load_plan import REFUSALS, add_rpc_servers, load_errors, load_plan
from coreinfer_edge.run.needed_memory import (
    core_set_bytes,
    fitting_context,
    has_room_for_weights,
)
from coreinfer_edge.run.options import DRAFT_DENSITY, Options
from coreinfer_edge.run.planning import PlanRequest
from coreinfer_edge.run.process_memory import release_free_memory
from coreinfer_edge.run.processors import default_threads
from coreinfer_edge.run.sampling import check_logit_bias, check_sampling, given_seed, random_seed
from coreinfer_edge.run.session import Run

if TYPE_CHECKING:
    from coreinfer_edge.run.gpu_plan import GpuPlan
    from coreinfer_edge.run.memory_plan import MemoryPlan


class _Call:
    """One use of a model: the run that it began, what it was asked for, and how it ended.

    Attributes:
        run: None as long as there is none.
    """

    def __init__(self, llama: CoreLlama, asked: Asked) -> None:
        self._llama, self._asked = llama, asked
        self.run: Run | None = None
        self.seed = 0
        self.max_tokens: int | None = None
        self.finish_reason: str | None = None
        self.context_full = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around what may begin the run; the lock must be held."""
        before = self._llama.run
        try:
            with self._llama.asking(self._asked):
                yield
        finally:
            if self._llama.run is not before:
                self.run = self._llama.run


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
        density: fraction of the bytes of the FFN weights to read for a token, averaged over the
            layers, in (0, 1]; the fraction of the neurons to keep where ``levels`` has full alone.
            ``"auto"``: for each prompt the smallest that keeps to ``quality``. Default: the whole
            model, multiplied by our own kernels, which round differently from llama.cpp's and lose
            nothing (``repack``); ``"auto"`` if another option of core sets is given (``strategy``,
            ``warmup``, ``quality``, ``layers``, ``refresh``); in a ``memory`` that the model does
            not fit, the largest that does. 1.0 is llama.cpp as it is, token for token.
        strategy: how the core set is chosen: ``"energy"`` (the default), ``"stability"``,
            ``"similarity"``, ``"griffin"``, ``"static"`` (see ``choose.strategies``), or
            ``"dense"`` for llama.cpp as it is. ``"similarity"`` and ``"static"`` need a model with
            statistics from calibration.
        warmup: generated tokens to decode dense while statistics go on being collected, or
            ``"auto"``: few for a long prompt, up to 64 for a short one, and none if the FFN weights
            are not in memory: each of these tokens then reads them all.
        memory: the private memory that this process may have: ``"1.5GiB"``, ``"800MB"``, a number
            of bytes, or ``"auto"`` for what is available here, less a tenth. If the model does not
            fit, the weights of its FFNs stay in the file: pre-fill reads them layer by layer, and
            decoding has the core set in memory. On the CPU only, and on Linux only.
        quality: for ``density="auto"``: the KL divergence from dense to core to keep to, in nats
            per token, as estimated on the last tokens before the choice. Default: 0.1.
        layers: the layers that stay dense, or the densities of some layers by number; negative
            numbers count from the end. The others share what is left of the density. By default
            ``"energy"`` and ``"static"`` keep the first and the last, where the density allows it.
        refresh: after so many tokens of the core set evaluate them once more dense, in one batch,
            and choose again; None for never.
        repack: load the weights into the layout of our own kernels, where the processor has them
            (x86 with AVX2, 64-bit ARM). They are faster than llama.cpp's for prompts and answers,
            and round differently, so that the text can differ after some tokens. The model is in
            memory once, and not mapped from its file. Default: on if it fits into the available
            memory, and off with ``density=1.0`` and ``strategy="dense"``, which are llama.cpp to
            the last bit.
        levels: the precisions that a neuron can have, of ``"full"`` (as stored), ``4``, ``3`` and
            ``2`` (bits); the prompt decides which each has, or that it is left out. Default: all of
            them where our own kernels hold the weights (``repack``) and have their types, or a GPU
            computes all layers and their widths allow it;
            elsewhere ``["full"]``, the paper's core set, which can be given too. ``last.levels``
            says which it was. Levels that cannot be had are refused. Given with
            ``strategy="static"`` and a density they are set once, when the model is loaded: prompts
            and answers run on them, nothing is chosen for a prompt, and the weights of the FFNs are
            never in memory whole. With ``memory`` the plan sets them once too, if the model has
            statistics and room for a density of 0.8, and ``strategy`` is left out.
        exact: the text of the whole model, token for token: the core set only drafts, and one dense
            pass verifies several tokens. Faster where a dense pass is dear, as where ``memory``
            leaves the weights in the file; where it does not pay, nothing is drafted. The text is
            ``EdgeLLM(path)``'s, and with ``repack=False`` that of llama.cpp. On a GPU it can differ
            where two tokens are equally likely, and from run to run: with FFNs in main memory the
            processor or the GPU verifies, whichever is faster when measured.
        gpu_memory: the memory of each GPU that this model may have: ``"3GiB"``, a number of bytes,
            or ``"auto"`` for what is free on it, less a tenth; several, in a sequence or as
            ``"3GiB,2GiB"``, for the GPUs in order. If the model does not fit, the weights of its
            FFNs stay in main memory: pre-fill sends them across, and decoding has the core set on
            the GPUs. ``density`` is then by default the largest that fits. With ``memory`` too,
            FFN weights that do not fit there stay in the file. CUDA then keeps no stacks for this
            process (docs/gpu.md).
        rpc: addresses, ``"host:port"``, of llama.cpp's RPC servers, whose devices count as GPUs.
        n_gpu_layers: layers to place on the GPU, as in llama-cpp-python; not with ``gpu_memory``.
        n_ctx: context in tokens; by default the model's own, at most 4096, and less, with a
            warning, where memory is short.
        seed: for sampling: each call with it draws the same tokens. None or -1: another one for
            each call, which ``last.seed`` tells.
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
        strategy: str | None = None,
        warmup: int | Literal["auto"] = "auto",
        memory: int | str | None = None,
        n_gpu_layers: int = 0,
        n_ctx: int | None = None,
        seed: int | None = None,
        verbose: bool = False,
        quality: float | None = None,
        layers: Iterable[int] | Mapping[int, float] | None = None,
        refresh: int | None = None,
        repack: bool | None = None,
        levels: Sequence[Level] | None = None,
        gpu_memory: int | str | Sequence[int | str] | None = None,
        rpc: str | Sequence[str] = (),
        exact: bool = False,
        **llama_kwargs: Any,
    ) -> None:
        given = Options(
            density,
            strategy,
            warmup,
            memory,
            n_ctx,
            seed,
            quality,
            layers,
            refresh,
            repack,
            levels,
            gpu_memory,
            exact,
        )
        options = given.settled()
        add_rpc_servers(rpc)
        if gpu_memory is not None and n_gpu_layers:
            raise ArgumentError("n_gpu_layers does not go with gpu_memory, which plans the layers")
        if exact and llama_kwargs.get("draft_model") is not None:
            raise ArgumentError("exact drafts itself: leave draft_model out")
        check_llama_arguments(llama_kwargs)
        header = overridden(header_of(path), llama_kwargs.get("kv_overrides"))
        check_loadable(header)
        check_chat_format(llama_kwargs.get("chat_format"), header.metadata)
        density = options.density
        self._seed = options.seed
        prior = None if options.strategy == "dense" else from_header(header)
        no_core_set = None
        if lora := llama_kwargs.get("lora_path"):
            no_core_set = check_lora(lora, header)
            wants_core_set = any(x is not None for x in (density, memory, gpu_memory))
            if no_core_set and options.strategy != "dense" and wants_core_set:
                raise UnsupportedModelError(no_core_set)
            llama_kwargs["lora_path"] = os.fspath(lora)
        if n_gpu_layers and not has_device():
            warnings.warn(
                "this build sees no GPU, so n_gpu_layers does nothing: see README, Install",
                RuntimeWarning,
                stacklevel=2,
            )
        n_threads, n_threads_batch = default_threads()
        llama_kwargs["n_threads"] = llama_kwargs.get("n_threads") or n_threads
        llama_kwargs["n_threads_batch"] = llama_kwargs.get("n_threads_batch") or n_threads_batch
        on_gpu = (n_gpu_layers and has_device()) or gpu_memory is not None
        core_bytes = (
            core_set_bytes(header, DRAFT_DENSITY if exact and density is None else density)
            if options.strategy != "dense" and not options.layers
            else 0
        )
        if memory is None and not on_gpu:
            # a plan knows better, and on a GPU it need not be this memory
            n_ctx = fitting_context(header, n_ctx, llama_kwargs, core_bytes)
        n_ctx = n_ctx or default_context(header)
        self._ffn_bytes = sum(layer.n_bytes for layer in dense_ffn(header).values())
        packed = False if gpu_memory is not None else options.repack
        if packed is None and memory is None:  # with a budget the plan says so
            if options.sets_once and isinstance(density, float):  # no neuron is there twice
                core_bytes = -int((1 - density) * self._ffn_bytes)
            packed = has_room_for_weights(header, n_ctx, llama_kwargs, core_bytes)
        check_positions(header, n_ctx)
        self._llama: CoreLlama | None = None
        self._last: Figures | None = None
        self._latest: _Call | None = None  # whose figures they are to be
        llama_kwargs.update(
            model_path=str(header.path),
            n_gpu_layers=n_gpu_layers,
            n_ctx=n_ctx,
            seed=random_seed() if self._seed is None else self._seed,
            packed=packed,
            tied=header.is_tied,
        )
        header = header.without_arrays()
        request = PlanRequest(
            header=header,
            llama_kwargs=llama_kwargs,
            density=density,
            strategy=options.strategy,
            layers=options.layers,
            prior=prior,
            levels=options.levels,
            exact=exact,
        )
        with load_errors(header, verbose):
            load = load_plan(request, given, options)
            for warning in load.warnings:
                warnings.warn(warning, RuntimeWarning, stacklevel=2)
            self.strategy, self._plan = load.strategy, load.plan
            self._llama = CoreLlama(
                density=load.density,
                quality=options.quality,
                strategy=load.strategy,
                layers=options.layers,
                refresh=options.refresh,
                levels=load.levels,
                warmup=options.warmup,
                files=header.files,
                prior=prior,
                placement=load.placement,
                most_density=load.most_density,
                set_once=load.set_once,
                no_core_set=no_core_set,
                exact=load.exact,
                verbose=verbose,
                **load.llama_kwargs,
            )
        if gpu_memory is not None and memory is not None:
            release_free_memory()  # through which weights went to the GPU
        if options.repack and not self._llama.packed_bytes:
            warnings.warn(
                "repack does nothing here: there are no kernels of ours for this processor and"
                " these types of weights, or a GPU is present",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def llama(self) -> CoreLlama:
        """The ``llama_cpp.Llama`` underneath, for everything that EdgeLLM has no method for."""
        if self._llama is None:
            raise ArgumentError("this EdgeLLM is closed: make a new one")
        return self._llama

    @property
    def plan(self) -> MemoryPlan | GpuPlan | None:
        """What was planned for ``memory`` or ``gpu_memory``; None without."""
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
                ``top_k``, ``seed``, ``grammar``, ...); and for this call alone ``density``,
                ``quality``, ``stop_when`` and ``on_token``, as ``core_llama.Asked`` describes them.

        Returns:
            The text that follows the prompt.

        Raises:
            PromptTooLongError: the prompt does not fit into the context.
        """
        _check_not_stream(sampling)
        sampling.update(max_tokens=max_tokens, temperature=temperature, stop=stop)
        answer = self.create_completion(prompt, **sampling)
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
        sampling.update(max_tokens=max_tokens, temperature=temperature, stop=stop)
        for chunk in self._stream_completion(prompt, sampling):
            if piece := chunk["choices"][0]["text"]:
                yield str(piece)

    def create_completion(
        self, prompt: str | Sequence[int], *, stream: bool = False, **sampling: Any
    ) -> Any:
        """As ``llama_cpp.Llama.create_completion``, OpenAI's dict, on the core path.

        Args:
            prompt: as for ``generate``.
            stream: an iterator of chunks.
            **sampling: arguments of ``llama_cpp.Llama.create_completion``, with its defaults
                (``max_tokens=16``). ``grammar`` may be text (GBNF).

        Raises:
            PromptTooLongError: the prompt does not fit into the context.
        """
        if stream:
            return self._stream_completion(prompt, sampling)
        asked = _taken(sampling)
        with self.llama.lock, self._call(asked) as call, call.watched():
            arguments = self._completion_arguments(call, sampling)
            answer: Any = self.llama.create_completion(self._prompt(prompt), **arguments)
            self._ended(call, answer)
        return answer

    def _stream_completion(
        self, prompt: str | Sequence[int], sampling: dict[str, Any]
    ) -> Iterator[Any]:
        asked = _taken(sampling)

        def chunks(call: _Call) -> Iterator[Any]:
            arguments = self._completion_arguments(call, sampling)
            yield from self.llama.create_completion(self._prompt(prompt), stream=True, **arguments)

        return self._streamed(chunks, asked)

    def _streamed(self, start: Callable[[_Call], Iterator[Any]], asked: Asked) -> Iterator[Any]:
        """The chunks of a stream; the lock is held only while one of them is computed."""
        llama = self.llama
        with self._call(asked) as call:
            chunks = start(call)
            while True:
                with llama.lock, call.watched():
                    chunk = next(chunks, None)
                    if chunk is not None:
                        self._ended(call, chunk)
                if chunk is None:
                    return
                yield chunk

    def _completion_arguments(self, call: _Call, sampling: Mapping[str, Any]) -> dict[str, Any]:
        arguments = {"max_tokens": 16, **sampling}
        self._draw(call, arguments)
        return arguments

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
                (``response_format``, ``grammar``, ``seed``, ...), and of ``Asked`` as in
                ``generate``.

        Returns:
            The answer, or an iterator over its pieces.

        Raises:
            PromptTooLongError: the conversation does not fit into the context.
            ArgumentError: also for ``tools``, which ``create_chat_completion`` takes: an answer
                that calls one is no text.
        """
        if tools_wanted(sampling):
            raise ArgumentError(
                "chat returns text, and an answer may be a tool call: use create_chat_completion,"
                " which returns both in OpenAI's form"
            )
        sampling.update(max_tokens=max_tokens, temperature=temperature, stop=stop)
        if stream:
            return self._stream_chat(self.create_chat_completion(messages, stream=True, **sampling))
        answer = self.create_chat_completion(messages, **sampling)
        return str(answer["choices"][0]["message"]["content"] or "")

    def _stream_chat(self, chunks: Iterator[Any]) -> Iterator[str]:
        for chunk in chunks:
            if piece := chunk["choices"][0]["delta"].get("content"):
                yield str(piece)

    def create_chat_completion(
        self, messages: list[dict[str, Any]], *, stream: bool = False, **sampling: Any
    ) -> Any:
        """As ``llama_cpp.Llama.create_chat_completion``, OpenAI's dict, on the core path.

        Tools that the answer calls are in ``["choices"][0]["message"]["tool_calls"]``, with
        ``finish_reason`` ``"tool_calls"``. ``tool_choice`` ``"required"`` or the name of a tool
        holds the answer to a call by a grammar; with ``"auto"``, the default, the chat template
        must have a place for tools, and the call is read out of the text.

        Args:
            messages: as for ``chat``.
            stream: an iterator of chunks. With tools the answer comes in one piece at the end.
            **sampling: arguments of ``llama_cpp.Llama.create_chat_completion``, with its defaults.
                ``grammar`` may be text (GBNF), ``response_format`` what OpenAI has.

        Raises:
            PromptTooLongError: the conversation does not fit into the context.
        """
        with self.llama.lock:
            self._last = self._latest = None
            # None is for the default, as in OpenAI's interface
            sampling = {name: value for name, value in sampling.items() if value is not None}
            asked = _taken(sampling)
            check_sampling(sampling)
            request = chat_request(self.llama, messages, sampling)
        if stream:
            return self._stream_chat_completion(request, asked)
        with self.llama.lock, self._call(asked) as call, call.watched():
            arguments = self._draw(call, request.arguments)
            answer = request.answered(self._started_chat(call, arguments))
            self._ended(call, answer)
        return answer

    def _stream_chat_completion(self, request: ChatRequest, asked: Asked) -> Iterator[Any]:
        def chunks(call: _Call) -> Iterator[Any]:
            arguments = self._draw(call, request.arguments)
            pieces = self._started_chat(call, {**arguments, "stream": True})
            yield from request.answered_in_pieces(pieces)

        return self._streamed(chunks, asked)

    def _started_chat(self, call: _Call, arguments: Mapping[str, Any]) -> Any:
        # some handlers of the binding do not pass the seed on
        self.llama.set_seed(call.seed)
        return self.llama.create_chat_completion(**arguments)

    def _draw(self, call: _Call, arguments: dict[str, Any]) -> dict[str, Any]:
        """Check what tokens are drawn by, and settle the seed."""
        check_sampling(arguments)
        check_logit_bias(arguments.get("logit_bias"), self.llama.n_vocab())
        given = given_seed(arguments.get("seed"))
        chosen = given if given is not None else self._seed
        call.seed = arguments["seed"] = random_seed() if chosen is None else chosen
        call.max_tokens = arguments.get("max_tokens")
        arguments["stop"] = _stop_texts(arguments.get("stop"))
        return arguments

    def _ended(self, call: _Call, answer: Any) -> None:
        """Note why an answer has ended, if it has."""
        choice = answer["choices"][0]
        if not choice["finish_reason"]:
            return
        run, n_ctx = self.llama.run, len(self.llama.input_ids)
        if run.stopped or run.prompt_tokens + run.completion_tokens > n_ctx:
            # it went on to complete a character, and was told that the text is over
            choice["finish_reason"] = "length"
        call.finish_reason = choice["finish_reason"]
        most = call.max_tokens if call.max_tokens and call.max_tokens > 0 else n_ctx
        cut = call.finish_reason == "length" and not run.stopped
        call.context_full = cut and most > n_ctx - run.prompt_tokens

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
    def _call(self, asked: Asked) -> Iterator[_Call]:
        """Around every use of the model: errors become ours, and figures are kept."""
        call = self._latest = _Call(self.llama, asked)
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
            raise ArgumentError(
                f"the prompt holds what is no text in UTF-8, at position {error.start}"
            ) from error
        except REFUSALS as error:
            # the binding has no class of its own for this
            too_long = re.match(r"Requested tokens \((\d+)\) exceed context window", str(error))
            if too_long:
                raise prompt_too_long(int(too_long[1]), len(self.llama.input_ids)) from error
            raise ArgumentError(f"llama_cpp refuses the arguments: {error}") from error
        except RuntimeError as error:
            raise NativeError(f"llama.cpp failed: {error}") from error
        finally:
            # a stream that is closed late, or dropped, is not the last call any more
            if call.run is not None and self._latest is call:
                self._last = None
                with suppress(MemoryError):  # or it would take the place of our error that says so
                    self._last = Figures.of(
                        call.run,
                        strategy=self.strategy
                        if call.run.steered or call.run.set_once
                        else "dense",
                        full_ffn_bytes=self._ffn_bytes,
                        finish_reason=call.finish_reason,
                        context_full=call.context_full,
                        seed=call.seed,
                    )


def _check_not_stream(sampling: Mapping[str, Any]) -> None:
    if "stream" in sampling:
        raise ArgumentError("stream is no argument here: call EdgeLLM.stream for pieces of text")


def _taken(sampling: dict[str, Any]) -> Asked:
    """What is ours of a call's arguments, which are the binding's afterwards."""
    names = (field.name for field in fields(Asked))
    return Asked(**{name: sampling.pop(name) for name in names if name in sampling})


def _stop_texts(stop: str | list[str] | None) -> list[str]:
    """Empty texts left out: they would end every answer at once."""
    texts = [stop] if isinstance(stop, str) else stop or []
    return [text for text in texts if text]
