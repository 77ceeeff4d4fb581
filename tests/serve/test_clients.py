"""Clients that people use, against the server of the demo model."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from serving import LONGEST, Served, serving

from coreinfer_edge.run.llm import EdgeLLM

pytestmark = pytest.mark.slow

MESSAGES: Any = [{"role": "user", "content": "Why is the sky blue?"}]
GREEDY: Any = {"model": "demo", "temperature": 0, "max_tokens": 24}


class Weather(pydantic.BaseModel):
    """What the weather is."""

    city: Literal["Paris", "Rome"]
    sunny: bool


@pytest.fixture(scope="module")
def client(demo: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{demo.url}/v1", api_key="any", max_retries=0, timeout=LONGEST
    ) as client:
        yield client


@pytest.fixture(scope="module")
def expected(demo_llm: EdgeLLM) -> str:
    return demo_llm.chat(MESSAGES, temperature=0, max_tokens=24)


# --- openai ---


def test_openai_gets_a_chat_and_a_completion(client: openai.OpenAI, expected: str) -> None:
    chat = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert chat.choices[0].message.content == expected
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 24
    assert chat.model_extra is not None
    assert chat.model_extra["coreinfer"]["density"] == 1
    completion = client.completions.create(prompt="Rome is", **GREEDY)
    assert completion.choices[0].text
    assert [model.id for model in client.models.list()] == ["demo"]


def test_openai_reads_a_stream(client: openai.OpenAI, expected: str) -> None:
    options: Any = {"stream_options": {"include_usage": True}, **GREEDY}
    *chunks, last = client.chat.completions.create(messages=MESSAGES, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert last.usage is not None
    assert last.usage.completion_tokens == 24


def test_openai_asks_at_the_same_time_with_asyncio(demo: Served, expected: str) -> None:
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="any") as client:

            async def one() -> str | None:
                chat = await client.chat.completions.create(messages=MESSAGES, **GREEDY)
                return chat.choices[0].message.content

            async def streamed() -> str:
                stream: Any = await client.chat.completions.create(
                    messages=MESSAGES, stream=True, **GREEDY
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return list(await asyncio.gather(one(), streamed(), one(), streamed()))

    assert asyncio.run(ask()) == [expected] * 4


def test_openai_parses_an_answer_that_is_held_to_a_schema(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        messages=[{"role": "user", "content": "It is sunny in Rome. Answer with JSON."}],
        response_format=Weather,
        model="demo",
        temperature=0,
        max_tokens=60,
    )
    weather = parsed.choices[0].message.parsed
    assert isinstance(weather, Weather)


def test_openai_calls_a_tool_and_sends_its_result(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather)
    options: Any = {**GREEDY, "max_tokens": 60}
    chat = client.chat.completions.create(
        messages=MESSAGES, tools=[tool], tool_choice="required", **options
    )
    message = chat.choices[0].message
    assert chat.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls
    call: Any = message.tool_calls[0]
    Weather.model_validate_json(call.function.arguments)
    *_, last = client.chat.completions.create(
        messages=MESSAGES, tools=[tool], tool_choice="required", stream=True, **options
    )
    assert last.choices[0].finish_reason == "tool_calls"
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    after = client.chat.completions.create(messages=[*MESSAGES, message, result], **GREEDY)
    assert after.choices[0].message.content


def test_openai_asks_for_our_fields_and_log_probabilities(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        messages=MESSAGES, logprobs=True, top_logprobs=2, extra_body={"density": 1.0}, **GREEDY
    )
    told = chat.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert "".join(item.token for item in told.content) == chat.choices[0].message.content


def test_openai_raises_its_own_errors(client: openai.OpenAI, demo_llm: EdgeLLM) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(prompt="word " * 2000, **GREEDY)
    with serving(demo_llm, api_key="right") as served:
        options: Any = {"base_url": f"{served.url}/v1", "max_retries": 0}
        with (
            openai.OpenAI(api_key="wrong", **options) as wrong,
            pytest.raises(openai.AuthenticationError),
        ):
            wrong.models.list()
        with openai.OpenAI(api_key="right", **options) as right:
            assert list(right.models.list())


def test_openai_that_closes_a_stream_frees_the_model(client: openai.OpenAI, demo: Served) -> None:
    stream: Any = client.completions.create(
        model="demo", prompt="1, 2, 3,", max_tokens=900, stream=True
    )
    next(iter(stream))
    stream.close()
    demo.wait_idle()


# --- LangChain ---


def test_langchain_chats_streams_and_gets_structured_output(demo: Served, expected: str) -> None:
    from langchain_openai import ChatOpenAI

    options: Any = {"base_url": f"{demo.url}/v1", "api_key": "any", "model": "demo"}
    chat = ChatOpenAI(temperature=0, max_tokens=24, **options)
    assert chat.invoke("Why is the sky blue?").content == expected
    pieces = [str(piece.content) for piece in chat.stream("Why is the sky blue?")]
    assert "".join(pieces) == expected
    assert len([piece for piece in pieces if piece]) > 10
    longer = ChatOpenAI(temperature=0, max_tokens=60, **options)
    for method in ("json_schema", "function_calling"):
        structured = longer.with_structured_output(Weather, method=method)  # type: ignore[arg-type]
        assert isinstance(structured.invoke("It is sunny in Rome."), Weather)


def test_langchain_completes_text(demo: Served, demo_llm: EdgeLLM) -> None:
    from langchain_openai import OpenAI

    options: Any = {"base_url": f"{demo.url}/v1", "api_key": "any", "model": "demo"}
    complete = OpenAI(temperature=0, max_tokens=16, **options)
    expected = demo_llm.generate("Rome is", temperature=0, max_tokens=16)
    assert complete.invoke("Rome is") == expected


# --- llm, https://llm.datasette.io ---


def test_llm_prompts_the_server(demo: Served, tmp_path: Path, expected: str) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: edge\n  model_name: demo\n  api_base: {demo.url}/v1\n"
    )
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    command = [sys.executable, "-m", "llm", "-m", "edge", "-o", "temperature", "0", "-o"]
    answer = subprocess.run(
        [*command, "max_tokens", "24", MESSAGES[0]["content"]],
        env=env,
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )
    assert answer.stdout.strip() == expected.strip(), answer.stderr


# --- any ---


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_made_from_the_description_is_a_defect(base_llm: EdgeLLM, mode: str) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error

    with serving(base_llm, time_limit=2.0) as served:
        description = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        for operation in description.get_all_operations():
            if mode == "negative" and operation.ok().method == "get":
                continue  # there is nothing in it to be wrong

            @settings(
                max_examples=15,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.ok().as_strategy(generation_mode=GenerationMode(mode)))
            def no_defect(case: Any) -> None:
                case.call_and_validate(checks=[not_a_server_error], timeout=LONGEST)

            no_defect()
