"""The text that a model is calibrated on: the user's, or what the model itself generates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coreinfer_edge.edge import EdgeLLM
from coreinfer_edge.errors import ArgumentError

# What generated texts begin with, in turn.
OPENINGS = (
    "The history of the town begins",
    "Dear friend,\n\nThank you for your letter.",
    "def main():\n",
    "Question: How does a refrigerator keep food cold?\nAnswer:",
    "Ingredients:\n- 2 cups of flour\n",
    "Once upon a time, in a small house near the forest,",
    "In this paper we show that",
    "The government announced on Tuesday that",
    "Chapter 1\n\n",
    "Step 1: Open the box and",
    '"I do not believe you," she said.',
    "The most important property of water is",
    "# Introduction\n\nThis guide explains",
    "A train leaves the station at 9 o'clock and travels at 80 km per hour.",
    "To be healthy, it helps to",
    "Python is a programming language that",
)
_ANSWER_TOKENS = 448


def read_calibration(file: Path) -> str:
    """The text in a file: all of it, or that of the lines of a .jsonl.

    A line of a .jsonl is an object with ``text``, or with ``messages`` (each with ``content``),
    or with ``prompt`` and ``response``; other members do not matter.

    Raises:
        ArgumentError: it cannot be read, or a line is something else.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ArgumentError(f"the calibration text {file} cannot be read: {reason}") from error
    if file.suffix.lower() != ".jsonl":
        return text
    lines = enumerate(text.splitlines(), start=1)
    return "\n\n".join(_text_of(line, f"{file}:{i}") for i, line in lines if line.strip())


def _text_of(line: str, place: str) -> str:
    try:
        item: Any = json.loads(line)
        if "text" in item:
            parts = [item["text"]]
        elif "messages" in item:
            parts = [message["content"] for message in item["messages"]]
        else:
            parts = [item["prompt"], item["response"]]
        return "\n".join(part + "" for part in parts)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArgumentError(
            f"{place} is no JSON object with text, messages (each with content), or prompt and"
            " response"
        ) from error


def generate_calibration(
    llm: EdgeLLM, n_tokens: int, seed: int, advance: Callable[[int], None] = lambda tokens: None
) -> str:
    """Text that the model generates from OPENINGS, the same for the same seed.

    Args:
        llm: the model, loaded with ``strategy="dense"``.
        n_tokens: how many tokens at the least, unless the model ends its texts all too soon.
        seed: of the sampling.
        advance: called with the number of tokens generated since the last call.
    """
    texts = []
    done = 0
    for i in range(len(OPENINGS) + 4 * n_tokens // _ANSWER_TOKENS):
        if done >= n_tokens:
            break
        opening = OPENINGS[i % len(OPENINGS)]
        answer = llm.generate(
            opening, max_tokens=_ANSWER_TOKENS, temperature=1.0, top_p=0.95, seed=seed + i
        )
        texts.append(opening + answer)
        assert llm.last is not None
        made = llm.last.prompt_tokens + llm.last.completion_tokens
        done += made
        advance(made)
    return "\n\n".join(texts)
