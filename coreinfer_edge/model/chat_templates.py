"""How a conversation is written for the model: its file's template, or a format by name."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NoReturn

import jinja2

from coreinfer_edge.binding.grammar import checked_grammar, sample_within_grammar
from coreinfer_edge.binding.llama import Llama, Sampler, chat_formats
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.errors import ArgumentError

Jinja2ChatFormatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter

TEMPLATE = "tokenizer.chat_template"

# They need more than a name (a tokenizer of transformers, a tool call in each message).
_NOT_FOR_TEXT = ("functionary", "functionary-v1", "functionary-v2")


def format_names() -> list[str]:
    """The formats that ``chat_format`` can name, whatever the model."""
    return sorted(name for name in chat_formats() if name not in _NOT_FOR_TEXT)


def check_chat_format(name: object, metadata: Mapping[str, Any]) -> None:
    """Refuse a ``chat_format`` that there is none of: the binding finds out when it is used.

    Args:
        name: the argument; None for the model's own template.
        metadata: of the model; its templates can be named too.
    """
    if name is None:
        return
    own = [key.removeprefix("tokenizer.") for key in metadata if key.startswith(f"{TEMPLATE}.")]
    if TEMPLATE in metadata:
        own.append("chat_template.default")
    if not isinstance(name, str) or name not in (*chat_formats(), *own):
        raise ArgumentError(
            f"chat_format is {name!r}: it must be one of {', '.join([*own, *format_names()])}"
        )


class CheckedLlama(Llama):
    """llama_cpp.Llama that refuses a chat template or a grammar that cannot be used.

    Without a template the binding takes llama-2's format, which hardly any model has learned, and
    it does not load with one that Jinja cannot read. Here the model loads, and a chat raises an
    ArgumentError, whose text is ``why_no_chat``. A grammar, which can be its text (GBNF), is
    checked: llama.cpp would end the process.
    """

    def __init__(self, **llama_kwargs: Any) -> None:
        given = any(llama_kwargs.get(name) for name in ("chat_format", "chat_handler"))
        super().__init__(template_formatter=_Formatter, **llama_kwargs)
        self.why_no_chat: str | None = None
        if not given:
            template = self.metadata.get(TEMPLATE)
            self.why_no_chat = _no_template(self.metadata) if template is None else _flaw(template)
            if self.why_no_chat is not None:
                self.set_chat_format("none", _refusing(self.why_no_chat))

    def _init_sampler(self, *args: Any, **options: Any) -> Any:
        if options.get("grammar") is None:
            return super()._init_sampler(*args, **options)
        options["grammar"] = checked_grammar(options["grammar"], self)
        sampler: Any = super()._init_sampler(*args, **options)
        sampler.__class__ = _GrammarSampler
        return sampler

    @property
    def chat_template(self) -> str | None:
        """The template in use; None for a format that is code, or a handler of the user's."""
        if self.chat_handler is not None or not self.chat_format:
            return None
        return self.metadata.get(f"tokenizer.{_key(self.chat_format)}")


class _GrammarSampler(Sampler):
    """The binding's, with a grammar among its samplers."""

    def sample(self, ctx: Any, idx: int = -1) -> int:
        return sample_within_grammar(self, ctx, idx)


class _Formatter(Jinja2ChatFormatter):
    """The binding's, whose template fails with an error of ours, and when it is used."""

    def __init__(self, template: str, **arguments: Any) -> None:
        self._flaw = _flaw(template)
        super().__init__(template="" if self._flaw else template, **arguments)

    def __call__(self, **arguments: Any) -> Any:
        if self._flaw:
            raise ArgumentError(self._flaw)
        try:
            return super().__call__(**arguments)
        except Exception as error:
            # what raise_exception is called with, or what the template trips over
            raise ArgumentError(
                f"the model's chat template refuses this conversation: {error}"
            ) from error


@functools.lru_cache(maxsize=8)
def _flaw(template: str) -> str | None:
    """Why Jinja cannot read a template; None if it can."""
    try:
        Jinja2ChatFormatter(template=template, eos_token="", bos_token="")
    except (jinja2.TemplateError, RecursionError, ValueError) as error:
        return (
            f"a chat template of this model (key {TEMPLATE}, or one that begins so) cannot be read:"
            f" {error}: {_REMEDY}"
        )
    return None


def _key(name: str) -> str:
    return "chat_template" if name == "chat_template.default" else name


_REMEDY = (
    "name the format that it has learned, with chat_format=..., or continue text with generate;"
    f" formats are {', '.join(format_names())}"
)


def _no_template(metadata: Mapping[str, str]) -> str:
    others = [key.removeprefix("tokenizer.") for key in metadata if key.startswith(f"{TEMPLATE}.")]
    return (
        f"this model has no chat template (key {TEMPLATE}), as base models have none: {_REMEDY}"
        + "".join(f", {name}" for name in others)
    )


def _refusing(problem: str) -> Any:
    def refuse(**_: Any) -> NoReturn:
        raise ArgumentError(problem)

    return refuse
