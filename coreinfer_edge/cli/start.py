"""The entry point of ``coreinfer-edge``: loads the command line."""

from __future__ import annotations

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command. Until it is loaded, Ctrl-C ends the process without a traceback."""
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from coreinfer_edge.cli import main as command

    signal.signal(signal.SIGINT, interrupt)
    command.main()
