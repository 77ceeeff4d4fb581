"""What a chat and a completion are asked: templates, messages, tools, forms, seeds, and the end."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from core_session import edge
from test_edge import only_ascii
from test_hostile_files import pair, rewrite

from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.calibrate.text import generate_calibration
from coreinfer_edge.errors import ArgumentError, CoreInferError, PromptTooLongError
from coreinfer_edge.run.chat_request import read_tool_calls
from coreinfer_edge.run.figures import Figures
from coreinfer_edge.run.llm import EdgeLLM

RandomModel = Callable[..., Path]
WithTemplate = Callable[[str | None], EdgeLLM]

HELLO = [{"role": "user", "content": "hello"}]
TEMPLATE = "tokenizer.chat_template"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def llm(random_model: RandomModel) -> Iterator[EdgeLLM]:
    with edge(random_model("llama"), n_ctx=256, warmup=0) as llm:
        yield llm


@pytest.fixture
def with_template(random_model: RandomModel, tmp_path: Path) -> Iterator[WithTemplate]:
    """A model whose chat template is another, or not there."""
    opened: list[EdgeLLM] = []

    def load(template: str | None) -> EdgeLLM:
        key = TEMPLATE if template is not None else "other"
        pairs = {TEMPLATE: pair(key, "str", template or "none")}
        path = rewrite(random_model("llama"), tmp_path / f"{len(opened)}.gguf", pairs)
        opened.append(edge(path, n_ctx=256, warmup=0))
        return opened[-1]

    yield load
    for llm in opened:
        llm.close()


def last(llm: EdgeLLM) -> Figures:
    assert llm.last is not None
    return llm.last


# --- templates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (None, f"no chat template.*{TEMPLATE}.*chat_format.*generate"),
        ("{% for m in messages %}{{ m.content }}", f"{TEMPLATE}.*cannot be read.*chat_format"),
        ("{{ messages | nosuchfilter }}", f"{TEMPLATE}.*cannot be read"),
    ],
)
def test_a_model_without_a_template_that_can_be_read_generates_and_says_what_chat_needs(
    template: str | None, told: str, with_template: WithTemplate
) -> None:
    llm = with_template(template)
    assert llm.generate("the hat", max_tokens=4)
    assert generate_calibration(llm, 20, seed=0)
    for chat in (llm.chat, llm.llama.create_chat_completion):
        with pytest.raises(ArgumentError, match=told):
            chat(HELLO)
    if template is not None:
        assert llm.llama.metadata[TEMPLATE] == template


def test_a_model_without_a_template_chats_in_a_format_that_is_named(
    random_model: RandomModel, tmp_path: Path
) -> None:
    pairs = {TEMPLATE: pair("other", "str", "none")}
    path = rewrite(random_model("llama"), tmp_path / "m.gguf", pairs)
    with edge(path, chat_format="chatml", n_ctx=256) as llm:
        llm.chat(HELLO, max_tokens=4)
        assert last(llm).completion_tokens > 0


@pytest.mark.parametrize("name", ["nosuch", "", 5])
def test_a_chat_format_that_there_is_none_of_is_refused_when_loading(
    name: Any, random_model: RandomModel
) -> None:
    with pytest.raises(ArgumentError, match=r"chat_format is .*chat_template\.default, .*chatml"):
        EdgeLLM(random_model("llama"), chat_format=name)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses.*roles must alternate"),
        ("{{ messages.nosuch.deeper }}", "refuses.*nosuch"),
        ("{{ 1 + 'a' }}", "refuses.*unsupported operand"),
    ],
)
def test_what_a_template_refuses_is_an_error_of_ours(
    template: str, told: str, with_template: WithTemplate
) -> None:
    llm = with_template(template)
    with pytest.raises(ArgumentError, match=told):
        llm.chat(HELLO)


# --- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("hi", "messages is 'hi'.*generate"),
        ({"role": "user", "content": "hi"}, "must be a list"),
        (5, "must be a list"),
        ([], "empty"),
        (["hi"], r"messages\[0\] is 'hi'"),
        ([*HELLO, {"content": "hi"}], r"messages\[1\] has the role None"),
        ([{"role": 5, "content": "hi"}], "the role 5"),
        ([{"role": "User", "content": "hi"}], "the role 'User'.*user"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": None}], "the content None"),
        ([{"role": "user", "content": 5}], "the content 5"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "text only"),
    ],
)
def test_messages_that_are_none_are_refused_with_what_is_wrong(
    messages: Any, told: str, llm: EdgeLLM
) -> None:
    with pytest.raises(ArgumentError, match=told):
        llm.chat(messages)
    with pytest.raises(ArgumentError, match=told):
        llm.chat(messages, stream=True)


def test_contents_in_parts_are_read_as_their_text(llm: EdgeLLM) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    in_parts = llm.chat([{"role": "user", "content": parts}], max_tokens=8, temperature=0)
    assert in_parts == llm.chat(HELLO, max_tokens=8, temperature=0)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": math.nan},
        {"temperature": -0.5},
        {"temperature": math.inf},
        {"temperature": "warm"},
        {"top_p": 1.5},
        {"top_p": -0.1},
        {"min_p": math.nan},
        {"typical_p": 2},
        {"repeat_penalty": 0},
        {"frequency_penalty": math.inf},
        {"mirostat_mode": 3},
        {"top_k": 1.5},
        {"max_tokens": "many"},
        {"max_tokens": True},
        {"seed": 2**32},
        {"seed": -2},
        {"seed": 1.5},
        {"stop": [5]},
        {"logit_bias": {10**7: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {3: math.nan}},
        {"logit_bias": [3]},
    ],
    ids=str,
)
def test_sampling_that_cannot_be_is_refused_by_name(sampling: dict[str, Any], llm: EdgeLLM) -> None:
    for call in (llm.generate, lambda text, **o: list(llm.stream(text, **o))):
        with pytest.raises(ArgumentError, match=f"^{next(iter(sampling))} (is|gives) "):
            call("the hat", **sampling)
    with pytest.raises(ArgumentError, match=f"^{next(iter(sampling))} (is|gives) "):
        llm.chat(HELLO, **sampling)


# --- the form of an answer -----------------------------------------------------------------------


SCHEMA = {
    "type": "object",
    "properties": {"hat": {"$ref": "#/$defs/colour"}, "n": {"type": ["null", "boolean"]}},
    "required": ["hat", "n"],
    "$defs": {"colour": {"enum": ["red", "blue"]}},
}


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_object", "schema": SCHEMA},
        {"type": "json_schema", "json_schema": {"name": "hat", "strict": True, "schema": SCHEMA}},
    ],
    ids=["llama-cpp-python", "openai"],
)
def test_an_answer_is_json_of_the_schema_that_response_format_has(
    form: dict[str, Any], llm: EdgeLLM
) -> None:
    for seed in range(3):
        answer = json.loads(llm.chat(HELLO, seed=seed, response_format=form))
        assert answer["hat"] in ("red", "blue")
        assert answer["n"] in (None, True, False)


def test_a_response_format_of_text_is_any_text(llm: EdgeLLM) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    plain = llm.chat(HELLO, **options)
    assert llm.chat(HELLO, response_format={"type": "text"}, **options) == plain


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"type": "yaml"}, "'yaml'.*text, json_object or json_schema"),
        ("json_object", "response_format is 'json_object'"),
        ({}, "response_format is"),
        ({"type": "json_schema"}, "has no schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "has no schema"),
        ({"type": "json_object", "schema": "x"}, "must be a JSON schema"),
        ({"type": "json_object", "schema": {"$ref": "#/$defs/no"}}, "'#/.defs/no', which is not"),
    ],
)
def test_a_response_format_that_there_is_none_of_is_refused(
    form: Any, told: str, llm: EdgeLLM
) -> None:
    with pytest.raises(ArgumentError, match=told):
        llm.chat(HELLO, response_format=form)


@pytest.mark.parametrize(
    ("grammar", "told"),
    [
        ("root ::= (", "expecting"),
        ("root ::= y", "y"),
        ('root ::= root "a" | "b"', "left recursion"),
        ('x ::= "a"', "no rule root"),
        ("", "no rule root"),
        ('root ::= "\\x00"', "no text"),
        (5, "grammar is 5"),
        ("root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000, "brackets in each other"),
        ("root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(100_000)), "rules"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_grammar_that_llama_cpp_dies_of_is_refused(
    grammar: Any, told: str, llm: EdgeLLM, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = [grammar]
    if isinstance(grammar, str):
        texts.append(llama_cpp.LlamaGrammar.from_string(grammar, verbose=False))
    for text in texts:
        with pytest.raises(ArgumentError, match=told):
            llm.generate("the hat", grammar=text)
        with pytest.raises(ArgumentError, match=told):
            llm.chat(HELLO, grammar=text)
        with pytest.raises(ArgumentError, match=told):
            llm.llama.create_completion("the hat", grammar=text)
        with pytest.raises(ArgumentError, match=told):
            list(llm.stream("the hat", grammar=text))
    assert llm.generate("the hat", max_tokens=2, temperature=0)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_grammar_that_leads_to_no_token_is_an_error_and_no_end_of_the_process(
    temperature: float, llm: EdgeLLM
) -> None:
    with pytest.raises(ArgumentError, match="none of this model's tokens can follow"):
        llm.generate("the hat", grammar='root ::= "ab" "\\x00"', temperature=temperature)
    assert llm.generate("the hat", max_tokens=2, temperature=0)


def test_a_grammar_can_be_given_as_text(llm: EdgeLLM) -> None:
    grammar = 'root ::= "yes" | "no"'
    assert llm.generate("the hat", grammar=grammar) in ("yes", "no")
    assert llm.chat(HELLO, grammar=grammar) in ("yes", "no")


# --- tools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["auto", "required", None])
def test_chat_returns_text_and_points_to_the_call_that_returns_tools(
    choice: str | None, llm: EdgeLLM
) -> None:
    with pytest.raises(ArgumentError, match="create_chat_completion"):
        llm.chat(HELLO, tools=[WEATHER], tool_choice=choice)
    assert isinstance(llm.chat(HELLO, tools=[WEATHER], tool_choice="none", max_tokens=4), str)


NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
def test_an_answer_that_must_be_a_call_is_one_whole_or_in_pieces(choice: Any, llm: EdgeLLM) -> None:
    options: dict[str, Any] = {"tools": [WEATHER], "tool_choice": choice, "seed": 1}
    answer = llm.create_chat_completion(HELLO, **options)["choices"][0]
    assert answer["finish_reason"] == "tool_calls" == last(llm).finish_reason
    assert answer["message"]["content"] is None
    (call,) = answer["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")

    chunks = list(llm.create_chat_completion(HELLO, stream=True, **options))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls" == last(llm).finish_reason
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    (streamed,) = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert streamed["index"] == 0
    assert streamed["function"] == call["function"]


def test_a_required_call_is_of_one_of_the_tools(llm: EdgeLLM) -> None:
    for seed in range(4):
        answer = llm.create_chat_completion(
            HELLO, tools=[WEATHER, CLOCK], tool_choice="required", seed=seed
        )
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] in ("weather", "clock")
        json.loads(call["function"]["arguments"])


def test_a_call_that_is_cut_off_says_so(llm: EdgeLLM) -> None:
    answer = llm.create_chat_completion(HELLO, tools=[WEATHER], tool_choice=NAMED, max_tokens=1)
    assert answer["choices"][0]["finish_reason"] == "length" == last(llm).finish_reason


def test_functions_of_before_tools_are_answered_as_they_were(llm: EdgeLLM) -> None:
    answer = llm.create_chat_completion(
        HELLO, functions=[WEATHER["function"]], function_call={"name": "weather"}
    )
    message = answer["choices"][0]["message"]
    assert message["function_call"]["name"] == "weather"
    assert message["function_call"] == message["tool_calls"][0]["function"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tools": [WEATHER]}, "no place for tools"),
        ({"tools": "x"}, "tools is 'x'"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\] is"),
        ({"tools": [WEATHER, WEATHER]}, "two tools"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "'sometimes'"),
        ({"tools": [WEATHER], "tool_choice": {"function": {"name": "no"}}}, "'no'.*weather"),
        ({"tool_choice": NAMED}, "no tools"),
        (
            {"tools": [WEATHER], "tool_choice": NAMED, "response_format": {"type": "json_object"}},
            "do not go together",
        ),
    ],
)
def test_tools_that_cannot_be_called_are_refused(
    options: dict[str, Any], told: str, llm: EdgeLLM
) -> None:
    with pytest.raises(ArgumentError, match=told):
        llm.create_chat_completion(HELLO, **options)


def test_with_a_template_for_tools_they_are_shown_and_the_text_is_an_answer_too(
    with_template: WithTemplate,
) -> None:
    llm = with_template("{% for t in tools %}{{ t.function.name }} {% endfor %}the hat")
    answer = llm.create_chat_completion(HELLO, tools=[WEATHER], max_tokens=8, temperature=0)
    text = answer["choices"][0]["message"]["content"]
    prompt = llm.llama.tokenize(b"weather the hat", add_bos=False, special=True)
    assert text == llm.generate(prompt, max_tokens=8, temperature=0)
    chunks = llm.create_chat_completion(
        HELLO, tools=[WEATHER], max_tokens=8, temperature=0, stream=True
    )
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text


def test_a_format_with_tools_of_its_own_calls_them_and_refuses_what_it_does_not_know(
    random_model: RandomModel,
) -> None:
    with edge(random_model("llama"), n_ctx=512, chat_format="chatml-function-calling") as llm:
        answer = llm.create_chat_completion(HELLO, tools=[WEATHER], tool_choice=NAMED, seed=1)
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
        again = llm.create_chat_completion(HELLO, tools=[WEATHER], tool_choice=NAMED, seed=1)
        assert again["choices"][0]["message"]["tool_calls"][0]["function"] == call["function"]
        with pytest.raises(ArgumentError, match=r"'required'.*name a tool"):
            llm.create_chat_completion(HELLO, tools=[WEATHER], tool_choice="required")


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ('<tool_call>\n{"name": "a", "arguments": {"x": 1}}\n</tool_call>', None, ["a"]),
        ('Let me see. <tool_call>{"name": "a", "arguments": {}}', "Let me see.", ["a"]),
        ('<tool_call>[{"name": "a"}, {"name": "b"}]</tool_call>', None, ["a", "b"]),
        ('{"name": "b", "parameters": {"x": 1}}', None, ["b"]),
        ('[TOOL_CALLS][{"name": "a", "arguments": {}}]', None, ["a"]),
        ('<|python_tag|>{"name": "a", "parameters": {}}', None, ["a"]),
    ],
)
def test_calls_are_read_out_of_what_models_write(
    text: str, content: str | None, names: list[str]
) -> None:
    read = read_tool_calls(text, ["a", "b"])
    assert read is not None
    assert read[0] == content
    assert [call["function"]["name"] for call in read[1]] == names
    for call in read[1]:
        assert isinstance(json.loads(call["function"]["arguments"]), dict)


@pytest.mark.parametrize(
    "text",
    ["hello", "", "[]", '{"name": "c", "arguments": {}}', '{"name": ["a"]}', "<tool_call>{", "5"],
)
def test_text_that_calls_no_tool_stays_text(text: str) -> None:
    assert read_tool_calls(text, ["a", "b"]) is None


# --- OpenAI's dicts ------------------------------------------------------------------------------


def test_completions_are_those_of_llama_cpp_python(llm: EdgeLLM) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "seed": 3}
    answer = llm.create_completion("the hat", **options)
    assert answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] == last(llm).completion_tokens
    chunks = list(llm.create_completion("the hat", stream=True, **options))
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == answer["choices"][0]["text"] == llm.generate("the hat", **options)


# --- seeds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, -1, llama_cpp.LLAMA_DEFAULT_SEED])
def test_without_a_seed_each_call_draws_anew_and_tells_how_to_repeat_it(
    seed: int | None, random_model: RandomModel
) -> None:
    texts, seeds = [], []
    for _ in range(2):
        with edge(random_model("llama"), n_ctx=256, seed=seed) as llm:
            for _ in range(2):
                texts.append(llm.generate("the hat", max_tokens=24, temperature=1.5))
                seeds.append(last(llm).seed)
            again = llm.generate("the hat", max_tokens=24, temperature=1.5, seed=seeds[-2])
            assert again == texts[-2]
            list(llm.stream("the hat", max_tokens=4, seed=-1))
            assert last(llm).seed not in seeds
    assert len(set(texts)) == len(set(seeds)) == 4


@pytest.mark.parametrize("seed", [0, 7])
def test_with_a_seed_the_same_call_gives_the_same_text_each_time(
    seed: int, random_model: RandomModel
) -> None:
    texts, chats = set(), set()
    for _ in range(2):
        with edge(random_model("llama"), n_ctx=256, seed=seed) as llm:
            for _ in range(3):
                texts.add(llm.generate("the hat", max_tokens=24, temperature=1.5))
                assert last(llm).seed == seed
                chats.add("".join(llm.chat(HELLO, max_tokens=24, stream=True)))
    assert len(texts) == len(chats) == 1


# --- why an answer has ended ---------------------------------------------------------------------

ENDS = {
    "max_tokens": ({"max_tokens": 5}, "length", False),
    "context": ({"max_tokens": 1000}, "length", True),
    "context, no limit": ({"max_tokens": None}, "length", True),
    "stop": ({"max_tokens": 50, "stop": ["w"]}, "stop", False),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_answer_says_why_it_has_ended(end: str, random_model: RandomModel) -> None:
    options, reason, full = ENDS[end]
    with edge(random_model("llama"), n_ctx=64, warmup=0) as llm:
        calls: list[Callable[[], Any]] = [
            lambda: llm.generate("the hat", temperature=0, **options),
            lambda: list(llm.stream("the hat", temperature=0, **options)),
            lambda: llm.chat(HELLO, temperature=0, **options),
            lambda: list(llm.chat(HELLO, temperature=0, stream=True, **options)),
        ]
        for call in calls:
            call()
            assert (last(llm).finish_reason, last(llm).context_full) == (reason, full)


def test_a_stream_that_is_left_has_no_reason_to_end(llm: EdgeLLM) -> None:
    stream = llm.stream("the hat", max_tokens=20, temperature=0)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert last(llm).finish_reason is None


@pytest.mark.parametrize("left", ["closed", "dropped", "read on"])
def test_a_stream_that_another_call_has_ended_leaves_the_figures_of_that_call(
    left: str, llm: EdgeLLM
) -> None:
    options: dict[str, Any] = {"temperature": 0, "logit_bias": only_ascii(llm)}
    stream = llm.stream("the hat", max_tokens=30, **options)
    next(stream)
    llm.generate("the man", max_tokens=20, **options)
    figures = llm.last
    if left == "closed":
        stream.close()  # type: ignore[attr-defined]
    elif left == "dropped":
        del stream
    else:
        with pytest.raises(ArgumentError, match="another call"):
            next(stream)
    assert figures is not None
    assert llm.last is figures


def test_figures_of_a_stream_do_not_come_after_a_chat_that_was_refused(llm: EdgeLLM) -> None:
    stream = llm.stream("the hat", max_tokens=30, temperature=0, logit_bias=only_ascii(llm))
    next(stream)
    with pytest.raises(ArgumentError):
        llm.create_chat_completion([])
    stream.close()  # type: ignore[attr-defined]
    assert llm.last is None


def test_a_chat_option_of_none_is_the_default(llm: EdgeLLM) -> None:
    options: dict[str, Any] = {"max_tokens": 6, "seed": 3}
    default = llm.create_chat_completion(HELLO, **options)["choices"]
    given = dict.fromkeys(("temperature", "top_p", "top_k", "stop", "logit_bias", "tools"))
    assert llm.create_chat_completion(HELLO, **options, **given)["choices"] == default


def test_what_a_required_call_is_not_held_to_is_told_once(llm: EdgeLLM) -> None:
    parameters = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0}}}
    tool = {"type": "function", "function": {"name": "count", "parameters": parameters}}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        llm.create_chat_completion(HELLO, tools=[tool], tool_choice="required", max_tokens=4)
    assert [str(warning.message)[:32] for warning in told] == ["the parameters of tool count: th"]


def test_functions_beside_tools_are_refused(llm: EdgeLLM) -> None:
    for beside in ({"tools": [WEATHER]}, {"tool_choice": "auto"}):
        with pytest.raises(ArgumentError, match="give tools and tool_choice alone"):
            llm.create_chat_completion(HELLO, functions=[CLOCK["function"]], **beside)


def test_a_prompt_that_is_refused_leaves_no_figures_of_the_call_before(llm: EdgeLLM) -> None:
    llm.generate("the hat", max_tokens=2)
    with pytest.raises(PromptTooLongError):
        llm.chat([{"role": "user", "content": "many words " * 300}])
    assert llm.last is None


def test_nothing_here_warns(llm: EdgeLLM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.chat(HELLO, max_tokens=2, response_format={"type": "json_object", "schema": SCHEMA})
    assert issubclass(ArgumentError, CoreInferError)
