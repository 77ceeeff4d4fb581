"""``coreinfer-edge chat``: talk with a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coreinfer_edge.cli.options import (
    AnswerOptions,
    AsJson,
    ChatFormat,
    MaxTokens,
    Model,
    Verbose,
    takes_options,
)
from coreinfer_edge.cli.output import (
    figures_of,
    print_figures,
    print_json,
    print_pieces,
    reports_errors,
    say_error,
    stdout_kept_for_json,
)
from coreinfer_edge.errors import ArgumentError, PromptTooLongError

if TYPE_CHECKING:
    from coreinfer_edge.run.llm import EdgeLLM


@dataclass(frozen=True)
class ChatOptions(AnswerOptions):
    max_tokens: MaxTokens = 512
    chat_format: ChatFormat = None


@reports_errors
@takes_options
def chat(
    model: Model,
    system: Annotated[
        str | None, typer.Option(help="A system message before the chat.", show_default=False)
    ] = None,
    *,
    options: ChatOptions,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Talk with a model.

    A line is a message; a backslash at its end continues it on the next line. /exit or Ctrl-D
    leaves, Ctrl-C stops an answer. Messages can also be piped in, one on each line.
    """
    messages = [{"role": "system", "content": system}] if system is not None else []
    n_fixed = len(messages)
    talk = list(messages)  # also the turns that the context has no room for
    sampling = options.sampling()
    interactive = sys.stdin.isatty() and not as_json
    figures: dict[str, Any] = {}
    with stdout_kept_for_json(as_json), options.open_model(model, verbose) as llm:
        if llm.llama.why_no_chat is not None:
            raise ArgumentError(llm.llama.why_no_chat)  # before the user types
        for message in _messages(interactive):
            messages.append({"role": "user", "content": message})
            try:
                messages, answer = _answer_what_fits(
                    llm, messages, n_fixed, interactive, **sampling
                )
            except PromptTooLongError as error:
                if not interactive:
                    raise
                say_error(str(error))
                messages.pop()  # that message alone
                continue
            messages.append({"role": "assistant", "content": answer})
            talk += messages[-2:]
            figures = figures_of(llm)
            if not as_json:
                print_figures(llm)
    if as_json:
        print_json({"model": model, "messages": talk, **figures})


def _answer_what_fits(
    llm: EdgeLLM,
    messages: list[dict[str, str]],
    n_fixed: int,
    interactive: bool,
    **options: Any,
) -> tuple[list[dict[str, str]], str]:
    """Answer the last message, and drop the oldest turns if the context is full.

    Returns:
        The messages in the context, and the answer.

    Raises:
        PromptTooLongError: the last message does not fit even without all other turns.
    """
    kept = messages
    while True:
        try:
            n_dropped = (len(messages) - len(kept)) // 2
            return kept, _answer(llm, kept, interactive, n_dropped, **options)
        except PromptTooLongError:
            if len(kept) <= n_fixed + 1:
                raise
            kept = kept[:n_fixed] + kept[n_fixed + 2 :]


def _answer(
    llm: EdgeLLM,
    messages: list[dict[str, str]],
    interactive: bool,
    n_dropped: int,
    **options: Any,
) -> str:
    """Print the model's answer as it comes. Ctrl-C at a terminal stops the answer, not the chat."""
    said: list[str] = []
    answer = llm.chat(messages, stream=True, **options)
    try:
        first = next(answer, "")  # raises an error if the messages do not fit
        if n_dropped:
            turns = "the oldest turn is" if n_dropped == 1 else f"the {n_dropped} oldest turns are"
            print(f"[the context is full: {turns} dropped]", file=sys.stderr)

        def pieces() -> Iterator[str]:
            for piece in chain([first], answer):
                said.append(piece)
                yield piece

        print_pieces(pieces())
    except KeyboardInterrupt:
        if not interactive:
            raise
    return "".join(said)


def _messages(interactive: bool) -> Iterator[str]:
    """The user's messages, until /exit or the end of the input."""
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() a history and editing)
        print(
            "/exit or Ctrl-D leaves, Ctrl-C stops an answer, \\ continues a line.", file=sys.stderr
        )
    lines: list[str] = []
    while True:
        try:
            line = _read_line("... " if lines else "> ", interactive)
        except KeyboardInterrupt:
            if not interactive:
                raise
            # As in a shell, Ctrl-C drops the typed text.
            lines = []
            print(file=sys.stderr)
            continue
        except UnicodeError:
            error = "a message on standard input is not UTF-8 text"
            if not interactive:
                raise ArgumentError(error) from None
            lines = []
            say_error(error)
            continue
        if line is None:
            if interactive:
                print(file=sys.stderr)
            elif lines:
                yield "\n".join(lines)
            return
        if line.endswith("\\"):
            lines.append(line[:-1])
            continue
        message = "\n".join([*lines, line])
        lines = []
        if message.strip() == "/exit":
            return
        if message.strip():
            yield message


def _read_line(prompt: str, interactive: bool) -> str | None:
    """A line without its end, or None at the end of the input.

    Raises:
        UnicodeError: it is not UTF-8.
    """
    if interactive:
        try:
            line = input(prompt)
        except EOFError:
            return None
        line.encode()  # some locales let bytes through, as halves of surrogate pairs
        return line
    # not as text: that is read ahead, and would fail before the messages that it has read
    content = sys.stdin.buffer.readline()
    return content.decode().rstrip("\r\n") if content else None
