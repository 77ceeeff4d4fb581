"""Runs the application with uvicorn, and ends it without cutting an answer in two."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import Callable, Sequence

import uvicorn

from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.model.source import header_of
from coreinfer_edge.run.arguments import default_context
from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.run.needed_memory import has_room_for_weights
from coreinfer_edge.serve.app import ServeOptions, Serving, create_app
from coreinfer_edge.serve.connections import HttpProtocol
from coreinfer_edge.serve.limits import is_loopback

# Connections beyond those that wait: of idle clients, and of the page.
_SPARE_CONNECTIONS = 240


def check_address(host: str, api_key: str | None) -> None:
    """Refuse to serve others without a key.

    Raises:
        ArgumentError: says so.
    """
    if api_key is not None and not api_key:
        raise ArgumentError("the API key is empty: give one, or none")
    if api_key is None and not is_loopback(host):
        raise ArgumentError(
            f"--host {host} lets other machines in: give --api-key, or the environment variable"
            " COREINFER_API_KEY, too"
        )


def check_origins(origins: Sequence[str]) -> None:
    """Refuse what no browser sends as the origin of a page, so that it would let nobody in.

    Raises:
        ArgumentError: says so.
    """
    for origin in origins:
        if origin == "null":
            raise ArgumentError(
                "--cors null lets in each file that a browser opens: give the origin of a page, or"
                " * for all"
            )
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+", origin):
            raise ArgumentError(
                f"--cors {origin} is no origin: give one like https://chat.example:8443, without a"
                " path, or * for all"
            )


def bound(host: str, port: int) -> socket.socket:
    """A socket at that address, which does not listen yet: an error shows before a model is loaded.

    Raises:
        ArgumentError: the address is no address, or taken.
    """
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        # with the protocol: asyncio sends small pieces at once only where it is TCP by its number
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ArgumentError(
            f"port {port} of {host} cannot be listened on: {error.strerror or error}:"
            " give another --port or --host"
        ) from error
    return listener


def mapping(path: str | os.PathLike[str], n_ctx: int | None, memory: str | None) -> dict[str, bool]:
    """The argument ``use_mmap`` for a model that is served.

    A file may be written to while it is served. What is mapped from it would be gone, and the
    process with it. So the weights are read into memory, where they fit and no plan says otherwise.
    """
    header = header_of(path)
    n_ctx = n_ctx or default_context(header)
    if memory is None and has_room_for_weights(header, n_ctx, {"use_mmap": False}):
        return {"use_mmap": False}
    return {}


class Server(uvicorn.Server):
    """uvicorn's server; what is being answered when it is to end has some time for it."""

    def __init__(
        self, llm: EdgeLLM, options: ServeOptions, ready: Callable[[], None] | None = None
    ) -> None:
        self.serving = Serving(llm, options)
        self._ready = ready
        super().__init__(
            uvicorn.Config(
                create_app(self.serving),
                http=HttpProtocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=options.queue + _SPARE_CONNECTIONS,
                # after the answers were cut, for their last words
                timeout_graceful_shutdown=round(options.grace) + 15,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        await super().startup(sockets)
        if self._ready is not None:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        turns, grace = self.serving.turns, self.serving.options.grace
        turns.refuse("the server is ending: try again when it is back")
        cut = asyncio.get_running_loop().call_later(grace, turns.cut, "the server has ended")
        forced = asyncio.create_task(self._cut_when_forced())
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()
            forced.cancel()
            turns.cut("the server has ended")

    async def _cut_when_forced(self) -> None:
        while not self.force_exit:
            await asyncio.sleep(0.1)
        self.serving.turns.cut("the server has ended")

    def close(self) -> None:
        """Wait until nothing computes; the model may go then."""
        self.serving.turns.close()


def serve(
    llm: EdgeLLM, listener: socket.socket, options: ServeOptions, ready: Callable[[], None]
) -> None:
    """Answer requests until a signal ends the process's work (SIGINT, SIGTERM).

    Args:
        llm: the model.
        listener: of ``bound``.
        options: of the server.
        ready: called when it listens.
    """
    server = Server(llm, options, ready)
    try:
        server.run(sockets=[listener])
    finally:
        server.close()


class _WithoutTraces(logging.Filter):
    """Leaves out the message of an unexpected error, which may quote a request."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[0]:
            record.msg = f"{str(record.msg).strip()}: unexpected {record.exc_info[0].__name__}"
            record.exc_info = None
        return True


def log_to_stderr(log_prompts: bool) -> None:
    """Each line with its time; of uvicorn only what is wrong."""
    handler = logging.StreamHandler()
    if not log_prompts:
        handler.addFilter(_WithoutTraces())
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    ours = logging.getLogger("coreinfer_edge.serve")
    ours.setLevel(logging.INFO)
    for logger in (ours, logging.getLogger("uvicorn")):
        logger.handlers = [handler]
        logger.propagate = False
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
