"""Measures free generation: the similarity of answers to the references of a task."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from coreinfer_edge.choose.statistics import Level
from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.measure.quality import Interval, Setting, confidence
from coreinfer_edge.run.arguments import read_text
from coreinfer_edge.run.llm import EdgeLLM


class Item(NamedTuple):
    """One line of a task."""

    prompt: str
    reference: str


@dataclass(frozen=True)
class TaskQuality:
    """The result of one setting on a task.

    Attributes:
        strategy, density_asked: the setting; ``"dense"`` and 1.0 for the dense model.
        levels: the precisions that neurons could have; empty for the dense model.
        density: fraction of the FFN in use at the end of the answers, averaged.
        rouge_l: ROUGE-L (F1) of the answers, compared with the references.
        kept: ``rouge_l`` divided by that of the dense model; None if that is 0.
        rouge_l_to_dense: ROUGE-L (F1) of the answers, compared with those of the dense model.
        n_items: number of prompts.
    """

    strategy: str
    levels: tuple[Level, ...]
    density_asked: float | Literal["auto"]
    density: float
    rouge_l: Interval
    kept: float | None
    rouge_l_to_dense: float
    n_items: int


def read_task(path: Path) -> list[Item]:
    """Read a task: on each line a JSON object with ``prompt`` and ``reference``.

    Raises:
        ArgumentError: the file cannot be read, or a line is something else.
    """
    items = []
    for number, line in enumerate(read_text(path, "the task").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            item = Item(value["prompt"], value["reference"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArgumentError(
                f"{path}, line {number}: it must be a JSON object with the fields prompt and"
                " reference"
            ) from error
        if not all(isinstance(text, str) and text for text in item):
            raise ArgumentError(f"{path}, line {number}: prompt and reference must be texts")
        items.append(item)
    if not items:
        raise ArgumentError(f"{path} is empty: a task has a JSON object on each line")
    return items


def measure_task(
    open_model: Callable[[Setting], EdgeLLM],
    items: Sequence[Item],
    settings: Sequence[Setting],
    max_tokens: int,
    advance: Callable[[], None] = lambda: None,
) -> list[TaskQuality]:
    """Generate greedily with the dense model and with each setting, and score by ROUGE-L.

    Args:
        open_model: loads the model with a setting; one model is open at a time.
        items: prompts and references.
        settings: the settings to measure after the dense model.
        max_tokens: the most tokens of an answer.
        advance: called after each answer.

    Raises:
        ArgumentError: the package rouge-score is not installed.
    """
    score = _rouge_l()
    results: list[TaskQuality] = []
    of_dense: list[str] = []
    for setting in (Setting("dense", 1.0), *settings):
        answers, densities = [], []
        with open_model(setting) as llm:
            chooser = llm.llama.chooser
            for item in items:
                answers.append(_answer(llm, item.prompt, max_tokens))
                densities.append(llm.last.density if llm.last else 1.0)
                advance()
        if not of_dense:
            of_dense = answers
        to_reference = [score(item.reference, a) for item, a in zip(items, answers, strict=True)]
        rouge_l = confidence(to_reference)
        dense = results[0].rouge_l.mean if results else rouge_l.mean
        results.append(
            TaskQuality(
                strategy=setting.strategy,
                levels=chooser.levels if chooser else (),
                density_asked=setting.density,
                density=float(np.mean(densities)),
                rouge_l=rouge_l,
                kept=rouge_l.mean / dense if dense > 0 else None,
                rouge_l_to_dense=float(
                    np.mean([score(d, a) for d, a in zip(of_dense, answers, strict=True)])
                ),
                n_items=len(items),
            )
        )
    return results


def _answer(llm: EdgeLLM, prompt: str, max_tokens: int) -> str:
    if llm.llama.why_no_chat is None:
        return llm.chat(
            [{"role": "user", "content": prompt}], max_tokens=max_tokens, temperature=0.0
        )
    return llm.generate(prompt, max_tokens=max_tokens, temperature=0.0)


def _rouge_l() -> Callable[[str, str], float]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ArgumentError(
            "scoring a task needs the package rouge-score: pip install 'coreinfer-edge[eval]'"
        ) from error
    scorer: Any = RougeScorer(["rougeL"], use_stemmer=True)

    def score(reference: str, answer: str) -> float:
        if reference == answer:
            return 1.0  # also if neither has a word
        return float(scorer.score(reference, answer)["rougeL"].fmeasure)

    return score
