"""The text that a model is calibrated on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coreinfer_edge.calibrate.text import (
    OPENINGS,
    QUESTIONS,
    generate_calibration,
    other_text,
    read_calibration,
)
from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.measure.quality import CHAT_PROMPTS
from coreinfer_edge.run.llm import EdgeLLM

RandomModel = Callable[..., Path]


def test_a_text_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text('{"text": "not parsed"}\n', encoding="utf-8")
    assert read_calibration(path) == '{"text": "not parsed"}\n'


def test_a_jsonl_file_gives_the_texts_of_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    items: list[dict[str, Any]] = [
        {"text": "one", "id": 5},
        {"messages": [{"role": "user", "content": "two"}, {"role": "x", "content": "three"}]},
        {"prompt": "four", "response": "five"},
    ]
    path.write_text("\n".join(map(json.dumps, items)) + "\n\n", encoding="utf-8")
    assert read_calibration(path) == "one\n\ntwo\nthree\n\nfour\nfive"


@pytest.mark.parametrize(
    "line", ["{", "5", '"text"', "[]", "{}", '{"text": 5}', '{"messages": [5]}', '{"prompt": "x"}']
)
def test_a_line_that_is_something_else_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ArgumentError, match=r"text\.jsonl:2 is not a JSON object with text"):
        read_calibration(path)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot be read: No such file"):
        read_calibration(tmp_path / "no.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ArgumentError, match="it is not UTF-8 text"):
        read_calibration(tmp_path / "binary")


@pytest.mark.slow
def test_what_is_generated_are_answers_and_texts_in_turn_the_same_for_the_same_seed(
    smollm2: Path,
) -> None:
    with EdgeLLM(smollm2, strategy="dense", n_ctx=512, n_threads=1, n_threads_batch=1) as llm:
        made: list[int] = []
        one, same, other = (generate_calibration(llm, 400, seed, made.append) for seed in (1, 1, 2))
        first, second = (llm.llama.detokenize(text, special=True).decode() for text in one[:2])
    assert one == same
    assert one != other
    assert first.startswith("<|im_start|>system\n")
    assert f"<|im_start|>user\n{QUESTIONS[0]}<|im_end|>\n<|im_start|>assistant\n" in first
    assert second.startswith(OPENINGS[0])
    assert made == [len(text) for text in one + same + other]


def test_a_model_without_a_chat_template_goes_on_from_our_openings(
    random_model: RandomModel,
) -> None:
    with EdgeLLM(random_model("llama"), strategy="dense", n_ctx=512) as llm:
        llm.llama.why_no_chat = "it has no chat template"
        texts = generate_calibration(llm, 600, seed=0)
        begins = llm.llama.tokenize(OPENINGS[0].encode())
    assert texts[0][: len(begins)] == begins


def test_the_questions_are_none_that_eval_measures_with() -> None:
    assert not set(QUESTIONS) & set(CHAT_PROMPTS)


def test_the_text_of_another_kind_is_the_same_every_time_and_long_enough_to_measure_on() -> None:
    text = other_text()
    assert text == other_text()
    assert len(text) > 50_000
    assert not any(question in text for question in QUESTIONS)


def test_there_are_24_chat_prompts_to_measure_on_and_none_twice() -> None:
    assert len(set(CHAT_PROMPTS)) == len(CHAT_PROMPTS) == 24
