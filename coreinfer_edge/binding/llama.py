"""llama_cpp.Llama with public names for its private parts; no other module touches those."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn

import numpy as np

from coreinfer_edge.binding.core import context_memory, has_device, loading
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.choose.statistics import Floats
from coreinfer_edge.errors import ArgumentError

# A grammar is checked where it is sampled from, in a class of its own.
Sampler = llama_cpp._internals.LlamaSampler

# Arguments that patches/binding-0001-arguments.patch adds for the package itself.
OURS = (
    "tensor_buft_overrides",
    "no_alloc",
    "use_extra_bufts",
    "progress_callback",
    "n_outputs_max",
    "template_formatter",
)


def chat_formats() -> Mapping[str, Any]:
    """The formats that the binding has by name; it registers them, and has no list."""
    registry = llama_cpp.llama_chat_format.LlamaChatCompletionHandlerRegistry()  # type: ignore[no-untyped-call]
    handlers: Mapping[str, Any] = registry._chat_handlers
    return handlers


class Llama(llama_cpp.Llama):
    """``llama_cpp.Llama`` that can take tokens back, and leave native memory to another process.

    Args:
        packed: load the weights into the layout of our own kernels, as ``core.loading`` describes.
            ``flash_attn`` is on then on a CPU, unless it is given: so attention has a kernel too.
        tied: as for ``core.loading``.
    """

    def __init__(self, *, packed: bool = False, tied: bool = False, **llama_kwargs: Any) -> None:
        self._dependents: weakref.WeakSet[Any] = weakref.WeakSet()
        self.packed, self.tied = False, tied
        self._sampled: int | None = None
        self._drawn_at = -1  # of the logits of the last batch
        try:
            with loading(packed, tied) as self.packed:
                if self.packed and not has_device():
                    llama_kwargs.setdefault("flash_attn", True)  # our attention is faster
                super().__init__(**llama_kwargs)
        except BaseException:
            # or the model would live as long as the exception
            with suppress(AttributeError):
                self._stack.close()
            raise

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weights in the layout of our own kernels."""
        return context_memory(self.ctx).packed

    @property
    def why_not_taken_back(self) -> str | None:
        """Why tokens cannot be taken out of the KV cache one by one; None if they can."""
        if llama_cpp.llama_model_is_recurrent(self.model) or llama_cpp.llama_model_is_hybrid(
            self.model
        ):
            return "it has a recurrent state"
        if llama_cpp.llama_model_n_swa(self.model) > 0 and not self.context_params.swa_full:
            return "its attention has a sliding window, and swa_full is False"
        return None

    def add_dependent(self, thing: Any) -> None:
        """Close ``thing``, which uses the model, before the model is freed."""
        self._dependents.add(thing)

    @property
    def seed(self) -> int:
        """The seed of the next run; the binding has the setter only, ``set_seed``."""
        return self._seed

    def set_chat_format(self, name: str, handler: Callable[..., Any]) -> None:
        """Add a chat format of this model alone, and use it; the binding's are global."""
        self._chat_handlers[name] = handler
        self.chat_format = name

    def forget(self, start: int) -> bool:
        """Take the tokens from position ``start`` on out of the KV cache, where it can do that."""
        memory = llama_cpp.llama_get_memory(self.ctx)
        return bool(llama_cpp.llama_memory_seq_rm(memory, 0, start, -1))

    def go_back(self, end: int) -> int:
        """Keep the tokens before ``end`` only; none where the KV cache cannot be cut there."""
        if end == 0 or not self.forget(end):
            llama_cpp.Llama.reset(self)  # type: ignore[no-untyped-call]
            end = 0
        self.n_tokens = end
        # The logits are not those of the last token any more, which the binding must know.
        self._requires_eval = True
        return end

    def logits_of(self, tokens: Sequence[int], start: int) -> Floats:
        """Evaluate at most a batch of tokens at ``start``; the logits of each [n, n_vocab].

        ``eval`` would add the tokens to ``input_ids``, and may copy the logits of the last alone.
        """
        self._batch.set_batch(batch=tokens, n_past=start, logits_all=True)
        self._ctx.decode(self._batch)
        logits: Floats = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits(self.ctx), shape=(len(tokens), self.n_vocab())
        ).copy()
        return logits

    def ends_text(self, token: int) -> bool:
        """Whether a token ends the text, or a turn of it."""
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        return bool(llama_cpp.llama_vocab_is_eog(vocab, token))

    def last_logits(self) -> Floats:
        """The logits [n_vocab] last drawn from, as long as nothing else is evaluated."""
        logits: Floats = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits_ith(self.ctx, self._drawn_at), shape=(self.n_vocab(),)
        )
        return logits

    def eval_each(self, tokens: Sequence[int]) -> None:
        """As ``eval``, of at most a batch, with logits of each token to sample from."""
        self.forget(self.n_tokens)
        self._batch.set_batch(batch=tokens, n_past=self.n_tokens, logits_all=True)
        self._ctx.decode(self._batch)
        start, end = self.n_tokens, self.n_tokens + len(tokens)
        self.input_ids[start:end] = tokens
        if self._logits_all:
            logits = llama_cpp.llama_get_logits(self.ctx)
            self.scores[start:end] = np.ctypeslib.as_array(logits, (end - start, self.n_vocab()))
        self.n_tokens = end
        self._requires_eval = False

    def ahead(self, tokens: Sequence[int], start: int) -> Floats:
        """Evaluate tokens at ``start``, not counting them; the last logits, until the next call."""
        self._batch.set_batch(batch=tokens, n_past=start, logits_all=False)
        self._ctx.decode(self._batch)
        logits = llama_cpp.llama_get_logits_ith(self.ctx, -1)
        result: Floats = np.ctypeslib.as_array(logits, (self.n_vocab(),))
        return result

    @contextmanager
    def sampler_ahead(self) -> Iterator[Callable[[], int]]:
        """A copy of the sampler, in its state: draws from the last logits, and accepts.

        Logits processors are left out. They may have a state of their own, which none can copy.
        """
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        sampler: Any = self._sampler
        copy: Any = Sampler.__new__(type(sampler))
        copy.sampler, copy.custom_samplers, copy._exit_stack = chain, [], ExitStack()
        try:
            custom = {i for i, _ in sampler.custom_samplers}
            for i in range(llama_cpp.llama_sampler_chain_n(sampler.sampler)):
                if i not in custom:
                    part = llama_cpp.llama_sampler_chain_get(sampler.sampler, i)
                    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_clone(part))
            yield lambda: int(copy.sample(self._ctx, -1))
        finally:
            llama_cpp.llama_sampler_free(chain)
            copy.sampler = None

    @property
    def _input_ids(self) -> Any:
        """What logits processors see: the tokens up to the one sampled after, and no drafts."""
        end = self.n_tokens if self._sampled is None else self._sampled
        # at the end of an answer the binding looks at the last, also if nothing was evaluated
        return self.input_ids[: max(1, end)]

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """As ``llama_cpp.Llama.sample``."""
        idx = kwargs.get("idx")
        self._sampled = None if idx is None else idx + 1
        self._drawn_at = -1 if idx is None else idx - self.n_tokens
        try:
            return int(super().sample(*args, **kwargs))
        finally:
            self._sampled = None

    def free(self, reason: str) -> None:
        """Free model and context; each later use raises an ArgumentError with this reason."""
        for thing in list(self._dependents):
            thing.close()
        self._sampler = None
        if "_stack" in vars(self):
            llama_cpp.Llama.close(self)
        self._replace(reason)

    def leave(self, reason: str) -> None:
        """As ``free``, but frees nothing: in a forked child that would wait for lost threads."""
        parts = vars(self)
        owned = (parts.get(name) for name in ("_model", "_ctx", "_batch", "_sampler"))
        for part in owned:
            if part is not None and not isinstance(part, _Gone):
                part._exit_stack.pop_all()
        if "_stack" in parts:
            self._stack.pop_all()
        self._replace(reason)

    def _replace(self, reason: str) -> None:
        gone: Any = _Gone(reason)
        self._model = self._ctx = self._batch = gone


class _Gone:
    """Stands for a model or context that was freed: each use is an error of ours, and no crash."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> NoReturn:
        raise ArgumentError(self._reason)
