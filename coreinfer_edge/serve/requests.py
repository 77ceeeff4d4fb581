"""What a request may say: OpenAI's fields, llama-cpp-python's, and ours.

The names and bounds of sampling are those of ``llama_cpp.server.types``. Its types are not used:
their defaults are not those of ``EdgeLLM``, and they refuse messages and tools that it takes.
A field that a request does not set has the default of ``EdgeLLM``. Unknown fields are passed over
with a warning in the answer: OpenAI refuses them, but clients send those of other servers too.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# What goes on to EdgeLLM as it is.
_PASSED_ON = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "mirostat_mode",
    "mirostat_tau",
    "mirostat_eta",
    "logit_bias",
    "seed",
    "stop",
    "grammar",
    "density",
    "quality",
    "exact",
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "response_format",
)

MOST_LOGPROBS = 20
# Characters. Each token takes the longer the more ways there are to go on.
MOST_GRAMMAR = 1 << 16

# On the average over a whole prompt. The longest tokens of usual vocabularies are so many spaces.
MOST_CHARACTERS_PER_TOKEN = 128

# Fields that are of OpenAI, and change nothing in an answer: nobody need be warned.
_WITHOUT_EFFECT = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
}
_MOST_NAMED = 8

Whole = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class StreamOptions(BaseModel):
    include_usage: bool | None = Field(None, description="Send a last chunk with the usage.")


class Request(BaseModel):
    """The fields that both kinds of completion have."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="Any name: the one model that is served answers.")
    stream: bool | None = Field(None, description="Send the answer as server-sent events.")
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = Field(None, description="Most tokens to generate.")
    temperature: float | None = Field(None, ge=0, description="0 takes the likeliest token.")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: Whole | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, ge=0, le=1)
    repeat_penalty: float | None = Field(None, gt=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    mirostat_mode: Literal[0, 1, 2] | None = None
    mirostat_tau: float | None = Field(None, ge=0)
    mirostat_eta: float | None = Field(None, ge=0)
    logit_bias: dict[str, float] | None = Field(
        None, max_length=1024, description="By token number."
    )
    seed: int | None = Field(None, ge=-1, lt=2**32, description="-1 is random.")
    stop: str | Annotated[list[str], Field(max_length=64)] | None = Field(
        None, description="Texts that end the answer."
    )
    grammar: str | None = Field(
        None, max_length=MOST_GRAMMAR, description="Hold the answer to this grammar (GBNF)."
    )
    n: Literal[1] | None = Field(None, description="One answer for each request.")
    user: str | None = None
    density: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] | None = Field(
        None,
        description="Share of the FFN's weights to decode with; auto: the least within quality."
        " Default: as the server was started.",
    )
    quality: float | None = Field(
        None, gt=0, description="The KL divergence in nats that density auto keeps to."
    )
    exact: bool | None = Field(
        None, description="The whole model's text, token for token: the core set only drafts."
    )

    @model_validator(mode="after")
    def _check_density(self) -> Request:
        if self.quality is not None and self.density not in (None, "auto"):
            raise ValueError("quality is what density auto keeps to: leave one out")
        if self.exact and self.density == 1:
            raise ValueError("exact drafts with a core set, and density 1 has none: leave one out")
        return self

    @property
    def n_logprobs(self) -> int | None:
        """How many likely tokens to tell beside each; None for no log probabilities at all."""
        raise NotImplementedError

    @property
    def n_characters(self) -> int:
        """How long its texts are together, or may be for the tokens that they have at least."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """Those for EdgeLLM that the request sets."""
        known = type(self).model_fields  # an unknown field is an attribute too
        given = {name: getattr(self, name) for name in _PASSED_ON if name in known}
        given["max_tokens"] = self.most_tokens
        return {name: value for name, value in given.items() if value is not None}

    @property
    def most_tokens(self) -> int | None:
        """The limit of the answer; None for the default."""
        return self.max_tokens

    @property
    def passed_over(self) -> str | None:
        """A warning that names the unknown fields; None without any."""
        given = {name for name, value in (self.model_extra or {}).items() if value is not None}
        names = sorted(given - _WITHOUT_EFFECT)
        if not names:
            return None
        named = ", ".join(name[:40] for name in names[:_MOST_NAMED])
        return f"unknown fields are passed over: {named}{', …' if names[_MOST_NAMED:] else ''}"

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Request):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)] | list[Whole] = Field(
        description="A text, or its tokens."
    )
    echo: bool | None = Field(None, description="Begin the answer with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    best_of: Literal[1] | None = None
    suffix: None = Field(None, description="Not available: the model continues the prompt.")
    response_format: None = Field(None, description="Of chats alone: give a grammar here.")

    model_config = {
        "json_schema_extra": {"examples": [{"prompt": "The history of Rome begins with"}]}
    }

    @model_validator(mode="before")
    @classmethod
    def _check_address(cls, given: Any) -> Any:
        if isinstance(given, dict) and "prompt" not in given and "messages" in given:
            raise ValueError("prompt is missing: messages go to /v1/chat/completions")
        return given

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo does not go with logprobs: those of a prompt are not kept")
        if self.echo and isinstance(self.given_prompt, list):
            raise ValueError("echo needs a prompt that is text")
        return self

    @property
    def given_prompt(self) -> str | list[int]:
        """The prompt itself, where a client sends a list of one."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            return prompt[0]
        return prompt  # type: ignore[return-value]

    @property
    def n_logprobs(self) -> int | None:
        """As ``Request`` says."""
        return self.logprobs

    @property
    def n_characters(self) -> int:
        """As ``Request`` says."""
        return len(self.given_prompt) if isinstance(self.given_prompt, str) else 0


class ChatRequest(Request):
    messages: list[dict[str, Any]] = Field(
        min_length=1, description='{"role": "system" | "user" | "assistant" | "tool", "content": …}'
    )
    max_completion_tokens: Count | None = Field(None, description="The new name of max_tokens.")
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = Field(None, description="The old name of tools.")
    function_call: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = Field(
        None, description="text, json_object, or json_schema, as OpenAI has them."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @field_validator("response_format")
    @classmethod
    def _check_size(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if len(json.dumps(value)) > MOST_GRAMMAR:
            raise ValueError(f"a schema may have {MOST_GRAMMAR} characters")
        return value

    model_config = {
        "json_schema_extra": {
            "examples": [{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}]
        }
    }

    @property
    def n_logprobs(self) -> int | None:
        """As ``Request`` says."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def n_characters(self) -> int:
        """As ``Request`` says."""
        # a message has a token at least
        return sum(
            MOST_CHARACTERS_PER_TOKEN + _n_characters(message.get("content"))
            for message in self.messages
        )

    @property
    def most_tokens(self) -> int | None:
        """As ``Request`` says."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def _n_characters(content: Any) -> int:
    if isinstance(content, list):
        return sum(_n_characters(part.get("text")) for part in content if isinstance(part, dict))
    return len(content) if isinstance(content, str) else 0
