"""What the server answers: EdgeLLM's text in OpenAI's form, with our figures."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest
from serving import Served, serving, streamed

from coreinfer_edge.run.llm import EdgeLLM

PROMPT = "The history of Rome begins with"
MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]
GREEDY = {"temperature": 0, "max_tokens": 24}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def ask(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(f"/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def test_a_completion_is_the_text_of_edge_llm(client: httpx.Client, demo_llm: EdgeLLM) -> None:
    answer = ask(client, "completions", prompt=PROMPT, **GREEDY)
    assert answer["choices"][0]["text"] == demo_llm.generate(PROMPT, **GREEDY)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert (answer["model"], answer["object"]) == ("demo", "text_completion")


def test_a_chat_is_the_text_of_edge_llm(client: httpx.Client, demo_llm: EdgeLLM) -> None:
    answer = ask(client, "chat/completions", messages=MESSAGES, **GREEDY)
    assert answer["choices"][0]["message"]["content"] == demo_llm.chat(MESSAGES, **GREEDY)


def test_fields_that_are_not_set_have_the_defaults_of_edge_llm(
    client: httpx.Client, demo_llm: EdgeLLM
) -> None:
    answer = ask(client, "chat/completions", messages=MESSAGES, seed=7, max_tokens=24)
    expected = demo_llm.create_chat_completion(MESSAGES, seed=7, max_tokens=24)
    assert answer["choices"][0]["message"] == expected["choices"][0]["message"]


@pytest.mark.parametrize(
    "body", [{"prompt": [PROMPT]}, {"prompt": [504, 2]}, {"prompt": ""}, {"prompt": []}]
)
def test_a_prompt_can_be_a_list_of_one_or_of_tokens_or_empty(
    client: httpx.Client, demo_llm: EdgeLLM, body: dict[str, Any]
) -> None:
    prompt = PROMPT if body["prompt"] == [PROMPT] else body["prompt"]
    answer = ask(client, "completions", **body, **GREEDY)
    assert answer["choices"][0]["text"] == demo_llm.generate(prompt, **GREEDY)


def test_the_pieces_of_a_stream_are_the_answer(client: httpx.Client) -> None:
    whole = ask(client, "completions", prompt=PROMPT, echo=True, **GREEDY)
    chunks = streamed(client, "/v1/completions", {"prompt": PROMPT, "echo": True, **GREEDY})
    assert len(chunks) > 10
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]
    assert whole["choices"][0]["text"].startswith(PROMPT)
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + [
        "length"
    ]
    whole = ask(client, "chat/completions", messages=MESSAGES, **GREEDY)
    chunks = streamed(client, "/v1/chat/completions", {"messages": MESSAGES, **GREEDY})
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"


def test_a_stop_text_ends_an_answer(client: httpx.Client) -> None:
    text = ask(client, "completions", prompt=PROMPT, **GREEDY)["choices"][0]["text"]
    stop = text.split()[3]
    answer = ask(client, "completions", prompt=PROMPT, stop=stop, **GREEDY)["choices"][0]
    assert answer["text"] == text[: text.index(stop)]
    assert answer["finish_reason"] == "stop"


def test_the_same_seed_gives_the_same_text(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 1.5}
    texts = [
        ask(client, "completions", seed=seed, **body)["choices"][0]["text"] for seed in (1, 2, 1)
    ]
    assert texts[0] == texts[2] != texts[1]


def test_usage_counts_tokens_and_our_figures_have_a_field_of_their_own(
    client: httpx.Client,
) -> None:
    answer = ask(client, "completions", prompt=PROMPT, **GREEDY)
    usage, figures = answer["usage"], answer["coreinfer"]
    assert usage["completion_tokens"] == 24
    assert usage["total_tokens"] == usage["prompt_tokens"] + 24
    assert figures["density"] == 1.0
    assert figures["decode_tokens_per_second"] > 0
    assert figures["queue_seconds"] >= 0
    assert figures["cut"] is None
    body = {"prompt": PROMPT, "stream_options": {"include_usage": True}, **GREEDY}
    *_, last, with_usage = streamed(client, "/v1/completions", body)
    assert last["coreinfer"]["completion_tokens"] == 24
    assert with_usage["usage"] == usage
    assert with_usage["choices"] == []


def test_a_request_has_the_density_that_it_asks_for_and_the_next_has_not(
    client: httpx.Client, demo_llm: EdgeLLM
) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 80}
    core = ask(client, "completions", density=0.4, **body)
    assert core["coreinfer"]["density"] == pytest.approx(0.4, abs=0.02)
    assert core["coreinfer"]["core_tokens"] > 0
    assert core["choices"][0]["text"] == demo_llm.generate(
        PROMPT, density=0.4, temperature=0, max_tokens=80
    )
    assert ask(client, "completions", **body)["coreinfer"]["density"] == 1.0


def test_a_stream_tells_density_and_estimated_kl_once_they_are_chosen(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 80, "quality": 0.5}
    chunks = streamed(client, "/v1/completions", body)
    told = [chunk["coreinfer"] for chunk in chunks if "coreinfer" in chunk]
    assert told[0] == {"density": 1.0, "estimated_kl": None}
    assert told[-1]["density"] == told[-2]["density"] < 1
    assert 0 < told[-2]["estimated_kl"] <= 0.5
    assert len(told) == 3  # at the start, with the choice, with the figures at the end


def test_exact_of_a_request_is_the_whole_models_text(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    asked = ({"exact": True, "density": 0.5}, {"exact": False}, {})
    texts = [ask(client, "completions", **body, **more)["choices"][0] for more in asked]
    assert texts[0] == texts[1] == texts[2]
    response = client.post(
        "/v1/completions", json={"prompt": PROMPT, "exact": True, "density": "auto"}
    )
    assert response.status_code == 400
    assert "exact" in response.json()["error"]["message"]


def test_log_probabilities_of_a_chat_are_those_of_its_tokens(client: httpx.Client) -> None:
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3, **GREEDY}
    choice = ask(client, "chat/completions", **body)["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 24
    assert "".join(item["token"] for item in content) == choice["message"]["content"]
    for item in content:
        likely = item["top_logprobs"]
        assert len(likely) == 3
        assert likely[0]["token"] == item["token"]  # it was greedy
        assert sum(math.exp(other["logprob"]) for other in likely) <= 1 + 1e-6
        assert bytes(item["bytes"]).decode() == item["token"]
    chunks = streamed(client, "/v1/chat/completions", body)
    found = [c["choices"][0].get("logprobs") for c in chunks if c["choices"]]
    assert [item for part in found if part for item in part["content"]] == content


def test_log_probabilities_of_a_completion_are_those_of_its_tokens(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "logprobs": 2, **GREEDY}
    choice = ask(client, "completions", **body)["choices"][0]
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"]
    assert told["text_offset"][1] == len(told["tokens"][0])
    for token, value, likely in zip(
        told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
    ):
        assert likely[token] == value == max(likely.values()) < 0
    found = [c["choices"][0]["logprobs"] for c in streamed(client, "/v1/completions", body)]
    assert [value for part in found if part for value in part["token_logprobs"]] == told[
        "token_logprobs"
    ]


def test_log_probabilities_agree_with_those_of_llama_cpp_for_all_tokens(
    client: httpx.Client, demo_llm: EdgeLLM, smollm2: Any
) -> None:
    body = {"prompt": PROMPT, "logprobs": 2, "temperature": 0, "max_tokens": 8}
    told = ask(client, "completions", **body)["choices"][0]["logprobs"]
    with EdgeLLM(smollm2, n_ctx=256, n_threads=1, logits_all=True) as llm:
        expected = llm.create_completion(**body)["choices"][0]["logprobs"]
    assert told["tokens"] == expected["tokens"]
    assert told["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-2)


def test_a_tool_that_is_forced_is_called(client: httpx.Client) -> None:
    choice = ask(
        client,
        "chat/completions",
        messages=MESSAGES,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        **GREEDY,
    )["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    assert choice["finish_reason"] == "tool_calls"


def test_what_a_schema_has_and_a_grammar_cannot_hold_to_is_told_in_the_answer(
    client: httpx.Client,
) -> None:
    schema = {"type": "array", "items": {"type": "number", "multipleOf": 7}, "maxItems": 2}
    answer = ask(
        client,
        "chat/completions",
        messages=MESSAGES,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        temperature=0,
        max_tokens=16,
    )
    assert "multipleOf" in " ".join(answer["coreinfer"]["warnings"])


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_fields_are_passed_over_and_named_in_the_answer(
    client: httpx.Client, stream: bool
) -> None:
    body = {"prompt": PROMPT, **GREEDY}
    # OpenAI's that change nothing, and one that is not set
    extra = {"temprature": 1, "cache_prompt": True, "store": False, "metadata": {}, "other": None}
    extra["tools"] = []  # known of chats
    if stream:
        *_, last = streamed(client, "/v1/completions", {**body, **extra})
    else:
        last = ask(client, "completions", **body, **extra)
        plain = ask(client, "completions", **body)
        assert last["choices"] == plain["choices"]
        assert plain["coreinfer"]["warnings"] == []
    (warning,) = last["coreinfer"]["warnings"]
    assert warning == "unknown fields are passed over: cache_prompt, temprature, tools"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"messages": MESSAGES}, "messages go to /v1/chat/completions"),
        ({}, "prompt"),
        ({"prompt": "a", "density": 0.5, "quality": 0.1}, "leave one out"),
        ({"prompt": "a", "density": 1, "exact": True}, "leave one out"),
    ],
)
def test_requests_that_contradict_themselves_or_lack_the_prompt_are_refused(
    client: httpx.Client, body: dict[str, Any], reason: str
) -> None:
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


def test_many_unknown_fields_make_no_long_warning(client: httpx.Client) -> None:
    extra = {f"{i:02}" + "x" * 1000: 1 for i in range(20)}
    answer = ask(client, "completions", prompt="a", **GREEDY, **extra)
    (warning,) = answer["coreinfer"]["warnings"]
    assert len(warning) < 400
    assert warning.endswith("…")


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "a temperature below 0": ("completions", {"temperature": -1}, "temperature"),
    "fewer tokens than one": ("completions", {"max_tokens": -1}, "max_tokens"),
    "no token": ("chat/completions", {"max_tokens": 0}, "max_tokens"),
    "no token by its new name": ("chat/completions", {"max_completion_tokens": -1}, "max_comp"),
    "several answers": ("completions", {"n": 2}, "n: Input should be 1"),
    "a suffix": ("completions", {"suffix": "x"}, "suffix"),
    "two prompts": ("completions", {"prompt": ["a", "b"]}, "prompt"),
    "a token that there is none of": ("completions", {"prompt": [10**6]}, "token 1000000"),
    "half a surrogate pair": ("completions", {"prompt": "\ud800"}, "no text"),
    "a density above 1": ("completions", {"density": 1.5}, "density"),
    "a quality of 0": ("completions", {"quality": 0}, "quality"),
    "an unknown bias": ("completions", {"logit_bias": {"x": 1}}, "logit_bias"),
    "a broken grammar": ("completions", {"grammar": "root ::= ("}, "grammar"),
    "echo of tokens": ("completions", {"prompt": [1], "echo": True}, "echo"),
    "no messages": ("chat/completions", {"messages": []}, "messages"),
    "a message without a role": ("chat/completions", {"messages": [{}]}, "role"),
    "a tool without a name": ("chat/completions", {"tools": [{}]}, "tools"),
    "a tool choice without tools": ("chat/completions", {"tool_choice": "required"}, "tool"),
    "a form of no chat": ("completions", {"response_format": {"type": "json_object"}}, "format"),
    "an unknown form": ("chat/completions", {"response_format": {"type": "x"}}, "format"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_refused_and_told_what_is_wrong(
    client: httpx.Client, case: str, stream: bool
) -> None:
    path, body, word = WRONG[case]
    default = {"prompt": PROMPT} if path == "completions" else {"messages": MESSAGES}
    content = json.dumps({**default, **body, "stream": stream})
    headers = {"Content-Type": "application/json"}
    response = client.post(f"/v1/{path}", content=content, headers=headers)
    assert response.status_code == 400
    error = response.json()["error"]
    assert word in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_refusal_names_the_field_that_is_wrong_as_openai_does(client: httpx.Client) -> None:
    for body, field in (
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "logit_bias": {"1": "x"}}, "logit_bias"),
        ({"prompt": 5}, "prompt"),
        ([], None),
    ):
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == field


def test_a_refusal_names_the_options_of_the_server_and_not_arguments(
    client: httpx.Client,
) -> None:
    response = client.post("/v1/completions", json={"prompt": "word " * 2000})
    assert "or give a larger --ctx of the server" in response.json()["error"]["message"]
    body = {"messages": MESSAGES, "tools": [TOOL]}
    message = client.post("/v1/chat/completions", json=body).json()["error"]["message"]
    assert "load with --chat-format chatml-function-calling" in message


def test_a_prompt_longer_than_the_context_is_refused_by_its_code(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"prompt": "word " * 2000})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_the_model_is_listed_with_what_it_can(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("demo", "model")
    assert model["coreinfer"] == {
        "n_ctx": 1024,
        "density": None,
        "core_sets": True,
        "whole": True,
        "chat": True,
    }
    assert client.get("/v1/models/demo").json() == model
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}


def test_a_monitor_may_ask_for_the_head_alone(client: httpx.Client) -> None:
    for path in ("/", "/health"):
        response = client.head(path)
        assert (response.status_code, response.content) == (200, b"")


def test_what_there_is_not_is_told_with_what_there_is(client: httpx.Client) -> None:
    response = client.post("/v1/embeddings", json={"input": "a"})
    assert response.status_code == 404
    assert "there is no /v1/embeddings here" in response.json()["error"]["message"]
    response = client.post("/v1/audio/transcriptions", files={"file": b"a"})
    assert response.status_code == 404
    response = client.get("/v1/chat/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    message = response.json()["error"]["message"]
    assert message == "/v1/chat/completions takes POST, and no GET"


def test_metrics_count_requests_and_tokens(client: httpx.Client, demo: Served) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def counts() -> dict[tuple[str, str], float]:
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        return {
            (sample.name, sample.labels.get("status", sample.labels.get("le", ""))): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
            if sample.labels.get("path", "/v1/completions") == "/v1/completions"
        }

    before = counts()
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 80, "density": 0.5}
    figures = ask(client, "completions", **body)["coreinfer"]
    client.post("/v1/completions", json={"n": 2})
    demo.wait_idle()
    after = counts()
    grown = {key: after[key] - before.get(key, 0) for key in after}
    assert grown["coreinfer_requests_total", "200"] == 1
    assert grown["coreinfer_requests_total", "400"] == 1
    assert grown["coreinfer_completion_tokens_total", ""] == 80
    assert grown["coreinfer_core_tokens_total", ""] == figures["core_tokens"] > 0
    assert grown["coreinfer_density_bucket", "0.6"] == 1
    assert grown["coreinfer_density_bucket", "0.4"] == 0
    assert after["coreinfer_queue_length", ""] == 0


def test_a_base_model_continues_text_and_says_why_it_does_not_chat(base_llm: EdgeLLM) -> None:
    with serving(base_llm) as served, httpx.Client(base_url=served.url) as client:
        assert client.get("/v1/models").json()["data"][0]["coreinfer"]["chat"] is False
        response = client.post("/v1/chat/completions", json={"messages": MESSAGES})
        assert response.status_code == 400
        assert "no chat template" in response.json()["error"]["message"]
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_an_answer_that_fails_in_the_middle_ends_with_an_error(
    base_llm: EdgeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coreinfer_edge.serve.answers import Answer

    pieces = Answer.pieces

    def failing(answer: Answer) -> Any:
        whole = pieces(answer)
        yield next(whole)
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(Answer, "pieces", failing)
    with (
        serving(base_llm) as served,
        httpx.Client(base_url=served.url) as client,
        client.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as response,
    ):
        lines = [line for line in response.iter_lines() if line]
    assert "unexpected ZeroDivisionError" in lines[-1]
    assert "secret" not in lines[-1]
    assert "data: [DONE]" not in lines
