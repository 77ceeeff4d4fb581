"""The figures of a call: how many tokens, how long, how much memory."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from coreinfer_edge.choose.statistics import Level
from coreinfer_edge.run.process_memory import peak_memory

if TYPE_CHECKING:
    from coreinfer_edge.run.session import Run


@dataclass(frozen=True)
class Figures:
    """What one call of ``generate``, ``stream`` or ``chat`` took.

    Attributes:
        prompt_tokens: tokens of the prompt, those found in the cache included.
        completion_tokens: tokens generated.
        warmup_tokens: how many of those were decoded dense, to add to the statistics.
        strategy: how the core set was chosen; ``"dense"`` where none was to be.
        set_once: the levels of the neurons were set when the model was loaded; the prompt was
            evaluated with them too, and all tokens are core tokens.
        density: fraction of the bytes of the FFN weights in use at the end, averaged over the
            layers; of the neurons where these are only kept or left out.
        levels: the precisions that neurons could have; empty where all was dense.
        estimated_kl: what ``density="auto"`` expects the density to cost on this prompt: KL
            divergence from dense to core in nats per token; None for a density that was given.
        prefill_seconds: evaluating the prompt.
        choose_seconds: choosing and gathering the core set.
        decode_seconds: all tokens after the first, sampling and refreshing included.
        decode_tokens_per_second: their rate, warm-up included.
        core_tokens: tokens decoded with the core set.
        core_seconds: decoding those.
        core_tokens_per_second: their rate, 0 if there were none.
        refreshes: how often the core set was chosen again.
        refresh_seconds: evaluating, choosing and gathering for that.
        drafted: tokens that the core set drafted (``exact``).
        accepted: how many of those the dense model drew too.
        passes: dense passes that verified them, or decoded a token.
        tokens_per_pass: tokens that a pass gave, 0 if there were none.
        core_ffn_bytes: FFN weights read per token at the end.
        full_ffn_bytes: FFN weights of the model.
        packed_bytes: weights in the layout of our own kernels (``repack``).
        peak_memory_bytes: highest resident memory of this process so far.
        streamed_bytes: FFN weights read from the file because they are not in memory.
        stream_seconds: reading them took.
        stream_waited_seconds: how long of that computing had to wait.
        major_faults: page faults that read from a disk, while decoding with the core set.
        peak_private_bytes: most private memory during this call, with ``memory`` only; else 0.
        finish_reason: why the answer ended, in OpenAI's words: ``"stop"`` (the model or a stop text
            ended it), ``"length"`` (cut: ``max_tokens``, or the context is full), ``"tool_calls"``;
            None for a stream that was not read to its end.
        context_full: the answer was cut because the context has no room left (``n_ctx``).
        seed: that tokens were drawn with; the same call with it gives the same text.
    """

    prompt_tokens: int
    completion_tokens: int
    warmup_tokens: int
    strategy: str
    set_once: bool
    density: float
    levels: tuple[Level, ...]
    estimated_kl: float | None
    prefill_seconds: float
    choose_seconds: float
    decode_seconds: float
    decode_tokens_per_second: float = field(init=False)
    core_tokens: int
    core_seconds: float
    core_tokens_per_second: float = field(init=False)
    refreshes: int
    refresh_seconds: float
    drafted: int
    accepted: int
    passes: int
    tokens_per_pass: float = field(init=False)
    core_ffn_bytes: int
    full_ffn_bytes: int
    packed_bytes: int
    peak_memory_bytes: int
    streamed_bytes: int
    stream_seconds: float
    stream_waited_seconds: float
    major_faults: int
    peak_private_bytes: int
    finish_reason: str | None
    context_full: bool
    seed: int

    @classmethod
    def of(cls, run: Run, **others: Any) -> Figures:
        """The figures of a run, of which those with the same name are taken as they are."""
        names = {field.name for field in fields(cls)}
        return cls(
            **{name: value for name, value in vars(run).items() if name in names},
            core_ffn_bytes=run.core_bytes or others["full_ffn_bytes"],
            peak_memory_bytes=peak_memory(),
            major_faults=run.core_faults,
            peak_private_bytes=run.peak_private,
            **others,
        )

    def __post_init__(self) -> None:
        decoded = _rate(max(0, self.completion_tokens - 1), self.decode_seconds)
        object.__setattr__(self, "decode_tokens_per_second", decoded)
        core = _rate(self.core_tokens, self.core_seconds)
        object.__setattr__(self, "core_tokens_per_second", core)
        per_pass = 1 + self.accepted / self.passes if self.passes else 0.0
        object.__setattr__(self, "tokens_per_pass", per_pass)


def _rate(n: int, seconds: float) -> float:
    return n / seconds if n and seconds > 0 else 0.0
