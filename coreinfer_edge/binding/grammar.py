"""Grammars that hold an answer to a form: checked before llama.cpp, which would end the process."""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.binding.log import captured_log
from coreinfer_edge.errors import ArgumentError

_grammars = llama_cpp.llama_grammar

ROOT = b"root"
# llama_token_data
_TOKEN = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
# The parser calls itself for each bracket in another, and for each rule that begins with another:
# about 400 bytes of stack, which has 8 MiB as a rule.
MOST_NESTED = 2000
MOST_RULES = 10_000
# A text, a set of characters, a comment: brackets in them are none.
_PARTS = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*|[()]|::=', re.DOTALL)
_HAS_MEMFD = hasattr(os, "memfd_create")

# Standard error is the process's: one thread at a time points it elsewhere, and none while another
# forks, or the child's would stay there.
_stderr_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_stderr_lock.acquire,
        after_in_parent=_stderr_lock.release,
        after_in_child=_stderr_lock.release,
    )


def checked_grammar(grammar: object, llama: llama_cpp.Llama) -> _grammars.LlamaGrammar:
    """A grammar that the model can follow.

    Args:
        grammar: a ``llama_cpp.LlamaGrammar``, or its text (GBNF).
        llama: the model, whose vocabulary it is to be spelled with.

    Raises:
        ArgumentError: it cannot be read, or no token can begin a text of it.
    """
    text = grammar._grammar if isinstance(grammar, _grammars.LlamaGrammar) else grammar
    if not isinstance(text, str):
        raise ArgumentError(
            f"grammar is {grammar!r:.80}: it must be a text (GBNF) or a llama_cpp.LlamaGrammar"
        )
    if not re.search(r"^\s*root\s*::=", text, re.MULTILINE):
        raise ArgumentError("the grammar has no rule root: give one, root ::= ...")
    _check_size(text)
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"the grammar holds what is no text: {error}") from error
    with captured_log() as log, _said_on_stderr() as said:
        vocab = llama_cpp.llama_model_get_vocab(llama.model)
        sampler = llama_cpp.llama_sampler_init_grammar(vocab, encoded, ROOT)
    lines = [*said, *"".join(log).splitlines()]
    if not sampler:
        reasons = [line for line in lines if "error" in line or "recurs" in line]
        reason = reasons[0] if reasons else "a rule begins with itself, or llama.cpp refuses it"
        reason = re.sub(r"^.*error parsing grammar: |^\w+: ", "", reason.strip())
        raise ArgumentError(f"the grammar cannot be read: {reason}")
    if sys.stderr is not None:  # without one, print would write to standard output
        for line in said:  # of others, who write meanwhile
            print(line, file=sys.stderr)
    try:
        if not _can_begin(sampler, llama.n_vocab()):
            raise ArgumentError("the grammar allows no text that this model's tokens can spell")
    finally:
        llama_cpp.llama_sampler_free(sampler)
    return _grammars.LlamaGrammar.from_string(text, verbose=False)


def _check_size(text: str) -> None:
    """Refuse a grammar that llama.cpp would die of."""
    n_rules = depth = 0
    for part in _PARTS.finditer(text):
        n_rules += part[0] == "::="
        depth += {"(": 1, ")": -1}.get(part[0], 0)
        if depth > MOST_NESTED or n_rules > MOST_RULES:
            raise ArgumentError(
                f"the grammar has more than {MOST_NESTED} brackets in each other, or more than"
                f" {MOST_RULES} rules: make it simpler"
            )


def _can_begin(sampler: Any, n_vocab: int) -> bool:
    """Whether the grammar leaves any token; llama.cpp takes one that it rejects, and dies."""
    tokens = np.zeros(n_vocab, dtype=_TOKEN)
    _apply(sampler, tokens)
    return bool(np.isfinite(tokens["logit"]).any())


def _apply(sampler: Any, tokens: NDArray[Any]) -> Any:
    """Let a sampler change the tokens [n_vocab]; they must outlive what this returns."""
    tokens["id"] = np.arange(len(tokens))
    data = tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
    array = llama_cpp.llama_token_data_array(data, len(tokens), -1, False)
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
    return array


def sample_within_grammar(sampler: Any, context: Any, idx: int = -1) -> int:
    """``llama_sampler_sample``, which ends the process where the grammar allows no token at all.

    Args:
        sampler: the binding's ``LlamaSampler``, with a grammar among its samplers.
        context: the binding's ``LlamaContext``.
        idx: of the logits to sample from, as llama.cpp counts them.

    Raises:
        ArgumentError: no token can follow.
    """
    vocab = llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context.ctx))
    tokens = np.zeros(llama_cpp.llama_vocab_n_tokens(vocab), dtype=_TOKEN)
    logits = llama_cpp.llama_get_logits_ith(context.ctx, idx)
    tokens["logit"] = np.ctypeslib.as_array(logits, shape=tokens.shape)
    array = _apply(sampler.sampler, tokens)
    if array.selected < 0 or not math.isfinite(array.data[array.selected].logit):
        raise ArgumentError(
            "the grammar leads to where none of this model's tokens can follow: change it"
        )
    token = int(array.data[array.selected].id)
    llama_cpp.llama_sampler_accept(sampler.sampler, token)
    return token


@contextmanager
def _said_on_stderr() -> Iterator[list[str]]:
    """The lines that a library writes to standard error meanwhile; the parser has no other way."""
    with _stderr_lock:
        yield from _read_from_stderr()


def _read_from_stderr() -> Iterator[list[str]]:
    lines: list[str] = []
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield lines
        return
    try:
        # no pipe: a long grammar, which is printed with the error, would fill it
        with open(os.memfd_create("grammar"), "w+b") if _HAS_MEMFD else TemporaryFile() as file:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(file.fileno(), 2)
            try:
                yield lines
            finally:
                os.dup2(kept, 2)
                file.seek(0)
                lines += file.read().decode("utf-8", "replace").splitlines()
    finally:
        os.close(kept)
