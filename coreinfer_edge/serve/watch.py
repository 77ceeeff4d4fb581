"""Counts each request, and writes a line about it to the log that tells nothing of a prompt."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("coreinfer_edge.serve")

# Where the route of an answer leaves its figures for the log, in the scope of the request.
LOG_DETAILS = "coreinfer_edge.details"

# A client that has gone gets no status; nginx counts it as this.
GONE = 499

ANSWERS = ("/v1/chat/completions", "/v1/completions")
_ROUTES = (*ANSWERS, "/v1/models", "/health", "/metrics", "/openapi.json", "/")


class Watch:
    """The outermost of the application.

    Args:
        app: behind it.
        count: is told the route and the status of each request.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None]) -> None:
        self._app, self._count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), GONE

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            # not the path itself: it may be long, and say anything
            route = scope["path"] if scope["path"] in _ROUTES else "other"
            self._count(route, status)
            level = logging.INFO if route in ANSWERS or status >= 400 else logging.DEBUG
            details = f", {scope[LOG_DETAILS]}" if LOG_DETAILS in scope else ""
            log.log(
                level,
                "%s %s: %d, %.2f s%s",
                scope["method"],
                route,
                status,
                time.monotonic() - began,
                details,
            )
