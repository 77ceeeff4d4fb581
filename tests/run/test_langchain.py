"""EdgeLLM in the place of LangChain's llama_cpp.Llama, as docs/python.md has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest

from coreinfer_edge.run.llm import EdgeLLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.langchain-community. is being sunset"),
]

QUESTION = "Why is the sky blue?"
GREEDY: Any = {"model_path": "", "temperature": 0, "max_tokens": 24, "repeat_penalty": 1.0}


class Weather(pydantic.BaseModel):
    """What the weather is."""

    city: Literal["Paris", "Rome"]
    sunny: bool


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> Iterator[EdgeLLM]:
    with EdgeLLM(smollm2, n_ctx=512, n_threads=1, n_threads_batch=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def chat(llm: EdgeLLM) -> Any:
    from langchain_community.chat_models import ChatLlamaCpp

    return ChatLlamaCpp.model_construct(client=llm, **GREEDY)


@pytest.mark.parametrize("streaming", [True, False])
def test_langchains_chat_model_gives_the_text_of_edge_llm(
    llm: EdgeLLM, chat: Any, streaming: bool
) -> None:
    answer = chat.model_copy(update={"streaming": streaming}).invoke(QUESTION)
    assert llm.last is not None
    assert llm.last.completion_tokens == 24
    messages = [{"role": "user", "content": QUESTION}]
    assert answer.content == llm.chat(messages, temperature=0, max_tokens=24)
    assert answer.response_metadata["finish_reason"] == "length"


def test_langchains_chat_model_streams(llm: EdgeLLM, chat: Any) -> None:
    pieces = [piece.content for piece in chat.stream(QUESTION)]
    assert len(pieces) > 10
    assert "".join(pieces) == chat.invoke(QUESTION).content


def test_langchains_chat_model_asks_for_a_density(llm: EdgeLLM, chat: Any) -> None:
    chat.bind(density=0.5, max_tokens=80).invoke(QUESTION)
    assert llm.last is not None
    assert llm.last.density == pytest.approx(0.5, abs=0.02)


def test_langchains_chat_model_gets_structured_output(chat: Any) -> None:
    structured = chat.model_copy(update={"max_tokens": 60}).with_structured_output(Weather)
    assert isinstance(structured.invoke("It is sunny in Rome."), Weather)


@pytest.mark.parametrize("of", ["create_completion", "llama"])
def test_langchains_completions_are_the_text_of_edge_llm(llm: EdgeLLM, of: str) -> None:
    from langchain_community.llms import LlamaCpp

    complete = LlamaCpp.model_construct(client=getattr(llm, of), **GREEDY)
    expected = llm.generate("Rome is", temperature=0, max_tokens=24)
    assert complete.invoke("Rome is") == "".join(complete.stream("Rome is")) == expected
    whole = complete.model_copy(update={"streaming": False})
    assert whole.invoke("Rome is", stop=["to"]) == expected.partition("to")[0]
    if of == "llama":
        n_tokens = len(llm.llama.tokenize(b"Rome is"))
        assert complete.get_num_tokens("Rome is") == n_tokens
