"""One request and its answer: what EdgeLLM gives, as OpenAI's JSON with our figures."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from coreinfer_edge.choose.statistics import Floats
from coreinfer_edge.errors import PromptTooLongError
from coreinfer_edge.run.figures import Figures
from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.serve.requests import (
    MOST_CHARACTERS_PER_TOKEN,
    ChatRequest,
    CompletionRequest,
)

# Told in the answer; others are of libraries, and for the log.
_FOR_CLIENTS = (RuntimeWarning, UserWarning)


class Answer:
    """The answer to one request; a ``turns.Job``.

    Args:
        llm: the model.
        request: what is asked.
        name: of the model, for the answer.
        seconds: the time limit from now on.

    Attributes:
        figures: of the call, when it is over; None if it was refused.
        first_seconds: from the start to the first piece of a stream.
    """

    def __init__(
        self, llm: EdgeLLM, request: ChatRequest | CompletionRequest, name: str, seconds: float
    ) -> None:
        self._llm, self._request, self._name = llm, request, name
        self.deadline = time.monotonic() + seconds
        self.cut: str | None = None
        self.queue_seconds = 0.0
        self.first_seconds: float | None = None
        self.figures: Figures | None = None
        self._caught: list[warnings.WarningMessage] = []
        n_logprobs = request.n_logprobs
        self._logprobs = None if n_logprobs is None else _LogProbs(llm, n_logprobs)

    def stops(self) -> bool:
        """Whether the answer is to end with its next token."""
        if self.cut is None and time.monotonic() > self.deadline:
            self.cut = "time limit"
        return self.cut is not None

    def pieces(self) -> Iterator[dict[str, Any]]:
        """The JSON objects of a stream, or the one of an answer in one piece."""
        started = time.monotonic()
        # This is the one thread that computes. A log is no place for what quotes a request.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._caught = caught
            for piece in self._stream() if self._request.stream else self._whole():
                if self.first_seconds is None and self._request.stream:
                    self.first_seconds = time.monotonic() - started
                yield piece

    def _check_length(self) -> None:
        """Refuse what cannot fit before it is taken apart into tokens, which nothing interrupts.

        llama.cpp takes time with the square of the number of special tokens in a text.
        """
        n_ctx = self._llm.llama.n_ctx()
        if self._request.n_characters > n_ctx * MOST_CHARACTERS_PER_TOKEN:
            raise PromptTooLongError(
                f"a prompt as long as this does not fit into the context of {n_ctx} tokens: shorten"
                " it"
            )

    def _ask(self) -> Any:
        self._check_length()
        request, asked = self._request, self._request.arguments()
        asked.update(stop_when=self.stops, stream=bool(request.stream))
        if self._logprobs is not None:
            asked["on_token"] = self._logprobs.note
        if isinstance(request, ChatRequest):
            return self._llm.create_chat_completion(request.messages, **asked)
        return self._llm.create_completion(request.given_prompt, **asked)

    def _whole(self) -> Iterator[dict[str, Any]]:
        answer = self._ask()
        self.figures = self._llm.last
        choice = answer["choices"][0]
        self._add_echo(choice)
        self._add_logprobs(choice)
        yield {**answer, "model": self._name, "usage": self._usage(), "coreinfer": self._told()}

    def _stream(self) -> Iterator[dict[str, Any]]:
        told: dict[str, Any] = {}
        last: dict[str, Any] | None = None
        first = True
        for chunk in self._ask():
            choice = chunk["choices"][0]
            chunk["model"] = self._name
            if first:
                self._add_echo(choice)
                first = False
            if choice["finish_reason"] is not None:
                last = chunk  # to be sent with the figures, which are known after the end
                continue
            if choice.get("text") or choice.get("delta", {}).get("content"):
                self._add_logprobs(choice)
            run = self._llm.llama.run
            now = {"density": run.density, "estimated_kl": run.estimated_kl}
            if now != told:
                chunk["coreinfer"] = told = now
            yield chunk
        self.figures = self._llm.last
        if last is not None:
            self._add_logprobs(last["choices"][0])
            yield {**last, "coreinfer": self._told()}
            if self._request.wants_usage:
                yield {**last, "choices": [], "usage": self._usage()}

    def _add_echo(self, choice: dict[str, Any]) -> None:
        if isinstance(self._request, CompletionRequest) and self._request.echo:
            choice["text"] = f"{self._request.given_prompt}{choice['text']}"

    def _add_logprobs(self, choice: dict[str, Any]) -> None:
        if self._logprobs is not None:
            chat = isinstance(self._request, ChatRequest)
            choice["logprobs"] = self._logprobs.for_chat() if chat else self._logprobs.for_text()

    def _usage(self) -> dict[str, int]:
        figures = self.figures
        prompt, completion = (
            (figures.prompt_tokens, figures.completion_tokens) if figures else (0, 0)
        )
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _told(self) -> dict[str, Any]:
        """Our figures."""
        figures = asdict(self.figures) if self.figures else {}
        return {
            **figures,
            "queue_seconds": self.queue_seconds,
            "cut": self.cut,
            "warnings": self._warnings(),
        }

    def _warnings(self) -> list[str]:
        caught = [w for w in self._caught if issubclass(w.category, _FOR_CLIENTS)]
        passed_over = self._request.passed_over
        return [*([passed_over] if passed_over else []), *(str(w.message) for w in caught)]


class _LogProbs:
    """The log probabilities of the tokens of an answer, those that are not told yet."""

    def __init__(self, llm: EdgeLLM, n_likely: int) -> None:
        self._llm, self._n_likely = llm, n_likely
        self._new: list[tuple[int, float, list[tuple[int, float]]]] = []
        self._offset = 0  # in the text so far

    def note(self, token: int, logits: Floats) -> None:
        """As ``Asked.on_token`` is called."""
        if self._llm.llama.ends_text(token):
            return
        most = float(logits.max())
        total = most + float(np.log(np.exp(logits - most).sum()))
        n = self._n_likely
        likely = np.argpartition(logits, -n)[-n:] if n else np.empty(0, dtype=np.intp)
        likely = likely[np.argsort(-logits[likely])]
        self._new.append(
            (
                token,
                float(logits[token]) - total,
                [(int(i), float(logits[i]) - total) for i in likely],
            )
        )

    def for_chat(self) -> dict[str, Any] | None:
        """Those of the new tokens as in a chat completion; None if there are none."""
        content = [
            {
                **self._described(token, logprob),
                "top_logprobs": [self._described(*pair) for pair in likely],
            }
            for token, logprob, likely in self._taken()
        ]
        return {"content": content, "refusal": None} if content else None

    def for_text(self) -> dict[str, Any] | None:
        """Those of the new tokens as in a completion; None if there are none."""
        result: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token, logprob, likely in self._taken():
            piece = self._piece(token)
            result["tokens"].append(_text(piece))
            result["token_logprobs"].append(logprob)
            result["top_logprobs"].append({_text(self._piece(i)): value for i, value in likely})
            result["text_offset"].append(self._offset)
            self._offset += len(_text(piece))
        return result if result["tokens"] else None

    def _taken(self) -> list[tuple[int, float, list[tuple[int, float]]]]:
        new, self._new = self._new, []
        return new

    def _described(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self._piece(token)
        return {"token": _text(piece), "logprob": logprob, "bytes": list(piece)}

    def _piece(self, token: int) -> bytes:
        # with a token before it, whose place would else begin with the space that llama.cpp drops
        return self._llm.llama.detokenize([token], prev_tokens=[token], special=True)


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", errors="replace")
