"""Checks how tokens are to be drawn: llama.cpp takes any number, and the binding passes it on."""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Mapping
from numbers import Real
from typing import Any

from coreinfer_edge.errors import ArgumentError

# llama.cpp takes this seed for a random one, of which it does not tell.
RANDOM_SEED = 0xFFFFFFFF

# The least and the most of each.
_RANGES = {
    "temperature": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "repeat_penalty": (0.0, math.inf),
    "frequency_penalty": (-math.inf, math.inf),
    "presence_penalty": (-math.inf, math.inf),
    "mirostat_tau": (0.0, math.inf),
    "mirostat_eta": (0.0, math.inf),
}


def check_sampling(arguments: Mapping[str, Any]) -> None:
    """Refuse what no token can be drawn by. Other arguments than of sampling are passed over."""
    for name, (least, most) in _RANGES.items():
        value = arguments.get(name, 1.0)
        if (
            isinstance(value, bool)
            or not isinstance(value, Real)
            or not math.isfinite(value)
            or not least <= float(value) <= most
            or (name == "repeat_penalty" and value == 0)
        ):
            at_most = "" if most == math.inf else f" to {most:g}"
            at_least = "" if least == -math.inf else f" from {least:g}{at_most}"
            above = " above 0" if name == "repeat_penalty" else at_least
            raise ArgumentError(f"{name} is {value!r}: it must be a number{above}")
    if (mode := arguments.get("mirostat_mode", 0)) not in (0, 1, 2):
        raise ArgumentError(f"mirostat_mode is {mode!r}: it must be 0 (off), 1 or 2")
    for name in ("top_k", "max_tokens"):
        value = arguments.get(name, 1)
        if name == "max_tokens" and value is None:
            continue
        if isinstance(value, bool) or not _is_index(value) or not -(2**31) <= value < 2**31:
            raise ArgumentError(f"{name} is {value!r}: it must be a whole number below 2147483648")
    stop = arguments.get("stop")
    if not (
        stop is None
        or isinstance(stop, str)
        or (isinstance(stop, list | tuple) and all(isinstance(text, str) for text in stop))
    ):
        raise ArgumentError(f"stop is {stop!r:.80}: it must be a text or a list of texts")


def check_logit_bias(bias: object, n_vocab: int) -> None:
    """Refuse a ``logit_bias`` of tokens that there are none of: it would fail token by token.

    Raises:
        ArgumentError: it is no dict from tokens to numbers.
    """
    if bias is None:
        return
    try:
        pairs = [(int(token), float(value)) for token, value in bias.items()]  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"logit_bias is {bias!r:.80}: it must be a dict from token numbers to numbers"
        ) from error
    for token, value in pairs:
        if not 0 <= token < n_vocab or math.isnan(value):
            raise ArgumentError(
                f"logit_bias gives token {token} {value}: tokens are 0 to {n_vocab - 1}, and it"
                " must be a number"
            )


def given_seed(seed: object) -> int | None:
    """A seed as it was given; None if it is to be random: None, -1, or llama.cpp's default.

    Raises:
        ArgumentError: it is no seed.
    """
    if seed is None:
        return None
    if isinstance(seed, bool) or not _is_index(seed):
        raise ArgumentError(f"seed is {seed!r}: it must be a whole number, or -1 for a random one")
    number = operator.index(seed)  # type: ignore[arg-type]
    if not -1 <= number <= RANDOM_SEED:
        raise ArgumentError(f"seed is {seed!r}: it must be from 0 to 4294967294, or -1 for random")
    return None if number in (-1, RANDOM_SEED) else number


def random_seed() -> int:
    return secrets.randbelow(RANDOM_SEED)


def _is_index(value: object) -> bool:
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
