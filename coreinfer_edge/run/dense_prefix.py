"""Which part of the KV cache a prompt may go on from without its text becoming another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from coreinfer_edge.choose.statistics import Extra, Statistics

# A prompt is evaluated in parts of at least this many tokens that end with a message. Each part
# reads the weights once, as decoding a token does: of shorter parts that would be more than 3 % of
# the time.
LEAST_TOKENS = 192

# How many ends are kept with their statistics: the first (of a system prompt), and the last two.
FIRST_KEPT, LAST_KEPT = 1, 2


def segment_ends(
    prompt: Sequence[int], ends_message: Callable[[int], bool], least: int, most: int
) -> list[int]:
    """Where the parts end in which a prompt is evaluated, its own end last.

    Args:
        prompt: the tokens.
        ends_message: whether a token is the last of a message.
        least: tokens of a part that ends with a message.
        most: tokens of any part.

    Whether a part ends at a position depends only on the tokens before it. So two prompts that
    begin alike have the same parts there, and the same keys and values to the last bit: how
    llama.cpp rounds depends on how many tokens are evaluated at once.
    """
    ends = []
    start = 0
    message_ends = {token for token in set(prompt) if ends_message(token)}
    for i, token in enumerate(prompt, 1):
        if i - start == most or (i - start >= least and token in message_ends):
            ends.append(i)
            start = i
    if start < len(prompt):
        ends.append(len(prompt))
    return ends


@dataclass
class DensePrefix:
    """The beginning of the KV cache that was evaluated dense, part by part from position 0.

    The text of a call depends on its own tokens and arguments alone, whoever asked before:

    - Keys and values of a prompt come from dense evaluation in the parts of ``segment_ends``. What
      a core set decoded is evaluated anew when it comes back as part of a prompt.
    - Statistics of a prompt are the sums over all its tokens, part by part, each token weighing
      the same. Those of the tokens found in the cache are kept here.

    So a prompt goes on from the end of a part that it shares with the last one, and a second turn
    asked in the conversation or with a fresh object has the same core set and the same text.

    Attributes:
        steered: whether statistics were collected.
        by_message: whether parts end with messages, and not only where a batch is full, as in
            stock llama.cpp. Runs of another kind share nothing with this one.
        tokens: those of the beginning, up to the last end.
        marks: ends of parts with the statistics of all tokens before them (None if not steered).
        extra: what the statistics have besides the sums.
    """

    steered: bool = False
    by_message: bool = False
    extra: Extra = field(default_factory=Extra)
    tokens: list[int] = field(default_factory=list)
    marks: list[tuple[int, Statistics | None]] = field(default_factory=list)

    def copy(self) -> DensePrefix:
        """One that does not change with this one; the statistics, which never do, are shared."""
        return DensePrefix(
            self.steered, self.by_message, self.extra, list(self.tokens), list(self.marks)
        )

    def common(self, prompt: Sequence[int], n_cached: int) -> int:
        """Where a prompt can go on: an end shared with it, 0 if there is none.

        Args:
            prompt: its last token has to be evaluated in any case.
            n_cached: tokens that are in the cache.
        """
        return max(
            (
                end
                for end, _ in self.marks
                if end < len(prompt) and end <= n_cached and self.tokens[:end] == prompt[:end]
            ),
            default=0,
        )

    def cut(self, end: int) -> None:
        """Forget what is at ``end`` and after it."""
        self.marks = [mark for mark in self.marks if mark[0] <= end]
        del self.tokens[self.marks[-1][0] if self.marks else 0 :]

    def at(self, end: int) -> Statistics | None:
        """The statistics of the tokens before an end."""
        return dict(self.marks).get(end)

    def add(self, prompt: Sequence[int], end: int, statistics: Statistics | None) -> None:
        """A part is evaluated that ends at ``end`` of ``prompt``."""
        self.tokens = list(prompt[:end])
        self.marks.append((end, statistics))
        if len(self.marks) > FIRST_KEPT + LAST_KEPT:
            del self.marks[FIRST_KEPT]
