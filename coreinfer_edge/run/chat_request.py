"""What a chat is asked: messages, the form of the answer and tools, checked; and what it answers.

OpenAI's words, as llama-cpp-python has them. Tools are offered through the model's chat template;
which of them the answer calls is read out of its text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.model.chat_templates import CheckedLlama
from coreinfer_edge.run.json_schema import format_grammar, schema_grammar

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

# Formats of the binding that offer and call tools by themselves.
_WITH_TOOLS = ("chatml-function-calling", "functionary", "functionary-v1", "functionary-v2")


def checked_messages(messages: Any, llama: CheckedLlama) -> list[dict[str, Any]]:
    """The messages, their contents as text.

    Raises:
        ArgumentError: they are no messages; says which is wrong, and how.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise ArgumentError(
            f"messages is {messages!r:.80}: it must be a list of"
            ' {"role": "user", "content": "..."}; generate continues a plain text'
        )
    checked = [_message(i, message, llama) for i, message in enumerate(messages)]
    if not checked:
        raise ArgumentError("messages is empty: give at least one message")
    return checked


def _message(i: int, message: Any, llama: CheckedLlama) -> dict[str, Any]:
    where = f"messages[{i}]"
    if not isinstance(message, Mapping):
        raise ArgumentError(
            f'{where} is {message!r:.80}: it must be {{"role": "user", "content": "..."}}'
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ArgumentError(f"{where} has the role {role!r:.80}: it must be user, assistant, ...")
    template = llama.chat_template
    if template is not None and role not in ROLES and role not in template:
        raise ArgumentError(
            f"{where} has the role {role!r:.80}: it must be one of {', '.join(ROLES)}"
        )
    content = message.get("content")
    calls = role == "assistant" and (message.get("tool_calls") or message.get("function_call"))
    if content is None and calls:
        return {**message, "content": ""}
    if isinstance(content, list) and llama.chat_handler is None:
        content = "".join(_text_part(f"{where} content[{k}]", p) for k, p in enumerate(content))
    if not isinstance(content, str) and llama.chat_handler is None:
        missing = "no content" if "content" not in message else f"the content {content!r:.80}"
        raise ArgumentError(f"{where} has {missing}: it must be text")
    return {**message, "content": content}


def _text_part(where: str, part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise ArgumentError(
            f'{where} is {part!r:.80}: this model reads text only, {{"type": "text", "text": ...}}'
        )
    return text


@dataclass
class ChatRequest:
    """One chat, checked.

    Attributes:
        arguments: for the binding's ``create_chat_completion``.
        tools: names of those that the answer may call, read out of its text.
        forced: the one that the answer is the arguments of.
        legacy: asked with ``functions``, so answered with ``function_call`` too.
    """

    arguments: dict[str, Any]
    tools: list[str] = field(default_factory=list)
    forced: str | None = None
    legacy: bool = False

    def answered(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The binding's answer, with the tools that it calls."""
        choice = answer["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        calls = self._calls(message["content"] or "", reason)
        if not calls:
            return answer
        content, tool_calls = calls
        message = {**message, "content": content, "tool_calls": tool_calls}
        if self.legacy:
            message["function_call"] = tool_calls[0]["function"]
        finish = "tool_calls" if reason == "stop" else reason
        return {**answer, "choices": [{**choice, "message": message, "finish_reason": finish}]}

    def answered_in_pieces(self, chunks: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """As ``answered``, of a stream. Where a tool may be called, the text comes at the end."""
        if not self.tools:
            yield from chunks
            return
        text, last = "", None
        for chunk in chunks:
            choice = chunk["choices"][0]
            text += choice["delta"].get("content") or ""
            if choice["finish_reason"] is not None:
                last = chunk
            elif "role" in choice["delta"]:
                yield chunk
        if last is None:
            return
        reason = last["choices"][0]["finish_reason"]
        calls = self._calls(text, reason)
        delta: dict[str, Any] = {"content": text}
        if calls:
            content, tool_calls = calls
            delta = {"tool_calls": [{"index": i, **call} for i, call in enumerate(tool_calls)]}
            if content:
                delta["content"] = content
            if self.legacy:
                delta["function_call"] = tool_calls[0]["function"]
            reason = "tool_calls" if reason == "stop" else reason
        choice = last["choices"][0]
        yield {**last, "choices": [{**choice, "delta": delta, "finish_reason": None}]}
        yield {**last, "choices": [{**choice, "finish_reason": reason}]}

    def _calls(self, text: str, reason: str) -> tuple[str | None, list[dict[str, Any]]] | None:
        """The text beside the calls, and the calls; None if there are none."""
        if self.forced is not None:
            return None, [_call(self.forced, text)]
        if not self.tools or reason not in ("stop", None):
            return None
        return read_tool_calls(text, self.tools)


def chat_request(llama: CheckedLlama, messages: Any, arguments: Mapping[str, Any]) -> ChatRequest:
    """Check a chat and put it as the binding understands it.

    Args:
        llama: the model.
        messages: the conversation.
        arguments: further ones of ``llama_cpp.Llama.create_chat_completion``; ``grammar`` may be
            text, ``response_format`` what OpenAI has.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    given["messages"] = checked_messages(messages, llama)
    request = ChatRequest(given)
    form = format_grammar(given.pop("response_format", None))
    if form is not None and "grammar" in given:
        raise ArgumentError("give response_format or grammar, not both")
    grammar = form if form is not None else given.pop("grammar", None)
    if llama.chat_handler is None and llama.chat_format not in _WITH_TOOLS:
        tool_grammar = _offer_tools(llama, request)
        if tool_grammar is not None and grammar is not None:
            raise ArgumentError("tools and a grammar or response_format do not go together")
        grammar = grammar if tool_grammar is None else tool_grammar
    elif given.get("tools"):
        _tool_schemas(given["tools"])
        choice = given.setdefault("tool_choice", "auto")
        if choice == "required":
            raise ArgumentError(
                f"tool_choice is 'required', which {llama.chat_format or 'this chat_handler'} does"
                " not know: name a tool"
            )
    if grammar is not None:
        given["grammar"] = grammar
    return request


def tools_wanted(arguments: Mapping[str, Any]) -> bool:
    """Whether the answer may be a tool call."""
    choice = arguments.get("tool_choice", arguments.get("function_call"))
    return bool(arguments.get("tools") or arguments.get("functions")) and choice != "none"


def _offer_tools(llama: CheckedLlama, request: ChatRequest) -> str | None:
    """Set the request up for its tools; the grammar of the answer, if it must be a call."""
    given = request.arguments
    tools, choice = given.pop("tools", None), given.pop("tool_choice", None)
    functions, function = given.pop("functions", None), given.pop("function_call", None)
    if functions is not None:
        if not isinstance(functions, list):
            raise ArgumentError(f"functions is {functions!r:.80}: it must be a list")
        if tools is not None or choice is not None:
            raise ArgumentError(
                "functions is what tools was called before: give tools and tool_choice alone"
            )
        request.legacy = True
        tools = [{"type": "function", "function": item} for item in functions]
        choice = {"function": function} if isinstance(function, dict) else function
    if not tools:
        if tools is not None and tools != []:
            raise ArgumentError(f"tools is {tools!r:.80}: it must be a list of tools")
        if choice not in (None, "none", "auto"):
            raise ArgumentError("tool_choice is given, and there are no tools")
        return None
    schemas = _tool_schemas(tools)
    if choice == "none":
        return None
    template = llama.chat_template
    shown = template is not None and re.search(r"\btools\b", template) is not None
    if shown:
        given["tools"] = tools  # for the template; which is called is read out of the answer
    request.tools = list(schemas)
    if isinstance(choice, dict):
        chosen = choice.get("function")
        name = chosen.get("name") if isinstance(chosen, dict) else None
        if name not in schemas:
            raise ArgumentError(
                f"tool_choice names {name!r}, and the tools are {', '.join(schemas)}"
            )
        request.forced = str(name)
        return schema_grammar(schemas[request.forced], f"the parameters of tool {name}")
    if choice == "required":
        for name, schema in schemas.items():
            schema_grammar(schema, f"the parameters of tool {name}")
        return _any_call(schemas)
    if choice not in (None, "auto"):
        raise ArgumentError(
            f'tool_choice is {choice!r:.80}: it must be "auto", "none", "required" or'
            ' {"type": "function", "function": {"name": ...}}'
        )
    if not shown:
        raise ArgumentError(
            "this model's chat template has no place for tools, so the model would not see them:"
            ' use tool_choice="required" or name a tool with it, describe the tools in a message,'
            " or load with chat_format='chatml-function-calling'"
        )
    return None


def _tool_schemas(tools: Any) -> dict[str, Any]:
    """The parameters of each tool by name."""
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise ArgumentError(f"tools is {tools!r:.80}: it must be a list of tools")
    schemas: dict[str, Any] = {}
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise ArgumentError(
                f'tools[{i}] is {tool!r:.80}: it must be {{"type": "function", "function":'
                ' {"name": ..., "description": ..., "parameters": <JSON schema>}}'
            )
        if name in schemas:
            raise ArgumentError(f"tools[{i}]: there are two tools of the name {name!r}")
        empty = {"type": "object", "properties": {}, "additionalProperties": False}
        assert isinstance(function, Mapping)
        schemas[name] = function.get("parameters") or empty
    return schemas


def _any_call(schemas: Mapping[str, Any]) -> str:
    """The grammar of ``{"name": ..., "arguments": {...}}``, for any of the tools."""
    definitions: dict[str, Any] = {}
    calls = []
    for i, (name, schema) in enumerate(schemas.items()):
        # references in the schema start from its root, which is elsewhere now
        definitions[f"tool{i}"] = _moved(schema, f"#/$defs/tool{i}")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": name},
                    "arguments": {"$ref": f"#/$defs/tool{i}"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    # each alone has been warned of
    return schema_grammar(
        {"anyOf": calls, "$defs": definitions}, "the parameters of tools", warn=False
    )


def _moved(schema: Any, root: str) -> Any:
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, root)
        for key, value in schema.items()
    }


_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


def read_tool_calls(
    text: str, tools: Sequence[str]
) -> tuple[str | None, list[dict[str, Any]]] | None:
    """The tool calls in an answer, and the text beside them; None if there are none.

    Known are JSON in ``<tool_call>`` (Hermes, Qwen, SmolLM) and an answer that is JSON as a whole,
    after ``[TOOL_CALLS]`` or ``<|python_tag|>`` or nothing (Mistral, Llama 3): one object or a list
    of them, with ``name`` and ``arguments`` or ``parameters``.
    """
    bodies = _TAGGED.findall(text)
    beside = _TAGGED.sub("", text).strip()
    if not bodies:
        bodies, beside = [re.sub(r"^\s*(\[TOOL_CALLS\]|<\|python_tag\|>)", "", text)], ""
    calls = []
    for body in bodies:
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return None
        for item in value if isinstance(value, list) else [value]:
            name = item.get("name") if isinstance(item, dict) else None
            if not isinstance(name, str) or name not in tools:
                return None
            given = item.get("arguments", item.get("parameters", {}))
            calls.append(_call(name, given if isinstance(given, str) else json.dumps(given)))
    return (beside or None, calls) if calls else None


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
