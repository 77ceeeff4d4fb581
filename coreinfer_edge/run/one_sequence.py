"""One of ``Sequences`` as the backend of a session: it gives the logits of what it decodes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from coreinfer_edge.binding.core import CoreContext
from coreinfer_edge.binding.sequences import Sequences
from coreinfer_edge.choose.statistics import Floats
from coreinfer_edge.run.session import AUTO_TOKENS


class OneSequence:
    """A sequence of tokens, empty at first. Methods are as ``session.Backend`` says.

    Args:
        sequences: all of them; they have room for the logits of as many tokens as are decoded, or
            evaluated again, at once.
        number: that of this one.
        spare: the number of one for ``again``.

    Attributes:
        most_again: the most tokens that ``again`` takes.
    """

    def __init__(self, sequences: Sequences, number: int, spare: int) -> None:
        self._sequences, self._number, self._spare = sequences, number, spare
        self._tokens: list[int] = []
        self.most_again = AUTO_TOKENS

    def copy(self, number: int) -> OneSequence:
        """Another that begins as this one is now."""
        self._sequences.copy(self._number, number)
        other = OneSequence(self._sequences, number, self._spare)
        other._tokens = list(self._tokens)
        return other

    def remove(self) -> None:
        """Make room for others."""
        self._sequences.remove(self._number)

    @property
    def core(self) -> CoreContext:
        """That of all sequences."""
        return self._sequences.core

    @property
    def n_tokens(self) -> int:
        """The number of tokens in the cache."""
        return len(self._tokens)

    def tokens_from(self, start: int) -> list[int]:
        """The tokens from position ``start`` on."""
        return self._tokens[start:]

    def dense(self, n_tokens: int) -> AbstractContextManager[None]:
        """Nothing: the weights are in memory."""
        return nullcontext()

    def read(self, tokens: Sequence[int]) -> None:
        """Add tokens whose next ones are known."""
        self._sequences.evaluate(self._number, len(self._tokens), tokens)
        self._tokens += tokens

    def decode(self, tokens: Sequence[int]) -> Floats:
        """Add tokens; the logits of each [n, n_vocab]."""
        logits = self._sequences.logits(self._number, len(self._tokens), tokens)
        self._tokens += tokens
        return logits

    def take_back(self, n: int) -> None:
        """Take the last tokens out of the cache."""
        start = len(self._tokens) - n
        self._sequences.remove(self._number, start)
        del self._tokens[start:]

    def again(self, n: int) -> Floats:
        """Evaluate the last tokens once more, beside what is there; the logits of each."""
        start = len(self._tokens) - n
        self._sequences.copy(self._number, self._spare, start)
        logits = self._sequences.logits(self._spare, start, self._tokens[start:])
        self._sequences.remove(self._spare)
        return logits

    def restore(self, n: int) -> None:
        """Nothing: ``again`` left the sequence as it was."""
