"""The calibration text: the user's, or text that the model itself generates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.run.arguments import read_text
from coreinfer_edge.run.llm import EdgeLLM

# The beginnings of generated texts, in turn.
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

# The questions to a model with a chat template, in turn; none is among ``quality.CHAT_PROMPTS``.
QUESTIONS = (
    "Why do leaves change their colour in autumn?",
    "Write a short story about a clockmaker and her cat.",
    "What is the difference between weather and climate?",
    "How do I bake bread at home?",
    "Explain what an algorithm is, with an example from everyday life.",
    "Write an e-mail to my landlord: the heating does not work.",
    "How does a vaccine protect against a disease?",
    "Suggest five ways to save electricity in a household.",
    "Write a Python function that counts the words of a text.",
    "Who was Marie Curie, and what is she known for?",
    "What are the advantages and disadvantages of electric cars?",
    "Explain fractions to a ten-year-old.",
    "Describe a day at the market in a small town by the sea.",
    "How can I prepare for a job interview?",
    "What happens in the body during sleep?",
    "Write a poem about the first snow.",
    "How does the stock market work?",
    "A shop sells pencils at 3 for 2 dollars. How much do 12 pencils cost, and why?",
    "Give me tips for growing tomatoes on a balcony.",
    "What caused the First World War?",
    "Explain the difference between a list and a dictionary in Python.",
    "How do I change a flat tyre?",
    "Write a dialogue between a teacher and a student who is late.",
    "What is photosynthesis?",
    "Which exercises can I do in an office?",
    "Tell me about the planets of the solar system.",
    "How can I learn a new language faster?",
    "Summarise what makes a good leader in one paragraph.",
    "What is inflation, and how does it change what people buy?",
    "Write instructions for a simple card game.",
    "How do birds find their way when they migrate?",
    "Plan a birthday party for ten children.",
)
_ANSWER_TOKENS = 256

_OTHER_CHARACTERS = 100_000


def read_calibration(file: Path) -> str:
    """The text in a file: the whole file, or the texts of the lines of a .jsonl.

    A line of a .jsonl is an object with ``text``, or with ``messages`` (each with ``content``),
    or with ``prompt`` and ``response``. Other members are ignored.

    Raises:
        ArgumentError: the file cannot be read, or a line is something else.
    """
    text = read_text(file, "the calibration text")
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
            f"{place} is not a JSON object with text, messages (each with content), or prompt and"
            " response"
        ) from error


def other_text() -> str:
    """Text of an unusual kind: the reference of the language Python, which Python ships.

    The harm that a prior does on other kinds of text is measured on this.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(text for _, text in sorted(topics.items()))[:_OTHER_CHARACTERS]


def generate_calibration(
    llm: EdgeLLM, n_tokens: int, seed: int, advance: Callable[[int], None] = lambda tokens: None
) -> list[list[int]]:
    """The tokens of texts that the model generates, the same for the same seed.

    Each text continues one of OPENINGS. If the model has a chat template, every other text is a
    conversation instead: one of QUESTIONS and its answer, with the template's tokens.

    Args:
        llm: the model, loaded with ``strategy="dense"``.
        n_tokens: the least number of tokens in all; fewer only if the model ends most texts early.
        seed: the seed of the sampling.
        advance: called with the number of tokens generated since the last call.
    """
    sampling: dict[str, Any] = {"max_tokens": _ANSWER_TOKENS, "temperature": 1.0, "top_p": 0.95}
    kinds: list[tuple[Callable[..., str], tuple[Any, ...]]] = [(llm.generate, OPENINGS)]
    if llm.llama.why_no_chat is None:
        messages = tuple([{"role": "user", "content": question}] for question in QUESTIONS)
        kinds.insert(0, (llm.chat, messages))
    texts: list[list[int]] = []
    done = 0
    for i in range(len(OPENINGS) + 4 * n_tokens // _ANSWER_TOKENS):
        if done >= n_tokens:
            break
        number, kind = divmod(i, len(kinds))
        generate, beginnings = kinds[kind]
        generate(beginnings[number % len(beginnings)], seed=seed + i, **sampling)
        texts.append(llm.llama.input_ids[: llm.llama.n_tokens].tolist())
        done += len(texts[-1])
        advance(len(texts[-1]))
    return texts
