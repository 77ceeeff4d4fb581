"""Replaces the names of Python arguments in error messages by command-line options."""

from __future__ import annotations

import re

_RENAMED = {
    "n_ctx": "--ctx",
    "n_threads": "--threads",
    "n_threads_batch": "--threads",
    "n_gpu_layers": "--gpu-layers",
    "gpu_memory": "--gpu-memory",
    "chat_format": "--chat-format",
    "max_tokens": "--max-tokens",
    "top_p": "--top-p",
    "top_k": "--top-k",
}
# Common words: they are arguments only before a value, as in density=0.5.
_WORDS = (
    "density|exact|quality|strategy|layers|levels|warmup|refresh|memory|repack|temperature"
    "|seed|stop"
)

_SET = re.compile(rf"(?<![\w./-])({'|'.join(_RENAMED)}|{_WORDS})=('[^']*'|[^\s,:;()]+)")
_NAMED = re.compile(rf"(?<![\w./-])({'|'.join(_RENAMED)})(?![\w/-]|\.\w)")


def with_option_names(message: str) -> str:
    """The message with options in place of arguments: ``n_ctx`` becomes ``--ctx``."""

    def set_to(match: re.Match[str]) -> str:
        name, value = match[1], match[2].strip("'")
        return f"{_RENAMED.get(name, f'--{name}')} {'NAME' if value == '...' else value}"

    message = re.sub(r"^memory is (?=')", "--memory is ", message)
    return _NAMED.sub(lambda match: _RENAMED[match[1]], _SET.sub(set_to, message))
