"""Writes a conversation for the model: with the template of its file, or a named format."""

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

# They need more than text (a tokenizer of transformers, a tool call in each message).
_NOT_FOR_TEXT = ("functionary", "functionary-v1", "functionary-v2")


def format_names() -> list[str]:
    """The formats that ``chat_format`` can name for every model."""
    return sorted(name for name in chat_formats() if name not in _NOT_FOR_TEXT)


def check_chat_format(name: object, metadata: Mapping[str, Any]) -> None:
    """Refuse an unknown ``chat_format``; the binding would notice only when it is used.

    Args:
        name: the argument; None for the model's own template.
        metadata: the metadata of the model, whose templates can be named too.
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
    """llama_cpp.Llama that refuses unusable chat templates and grammars.

    For a model without a template the binding uses llama-2's format, which hardly any model has
    learned. It does not load a model whose template Jinja cannot read. Here both models load, and a
    chat raises an ArgumentError with the text ``why_no_chat``. A grammar can be text (GBNF). It is
    checked, because llama.cpp would abort.
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
        """The template in use; None for a format in code, or a handler of the user."""
        if self.chat_handler is not None or not self.chat_format:
            return None
        return self.metadata.get(f"tokenizer.{_key(self.chat_format)}")


class _GrammarSampler(Sampler):
    """The binding's sampler chain, with a grammar in it."""

    def sample(self, ctx: Any, idx: int = -1) -> int:
        return sample_within_grammar(self, ctx, idx)


class _Formatter(Jinja2ChatFormatter):
    """The binding's formatter; a bad template raises our error, and only when it is used."""

    def __init__(self, template: str, **arguments: Any) -> None:
        self._flaw = _flaw(template)
        super().__init__(template="" if self._flaw else template, **arguments)

    def __call__(self, **arguments: Any) -> Any:
        if self._flaw:
            raise ArgumentError(self._flaw)
        try:
            return super().__call__(**arguments)
        except Exception as error:
            # the text of the template's raise_exception, or an error in the template
            raise ArgumentError(
                f"the model's chat template refuses this conversation: {error}"
            ) from error


@functools.lru_cache(maxsize=8)
def _flaw(template: str) -> str | None:
    """The reason why Jinja cannot read a template; None if it can."""
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
