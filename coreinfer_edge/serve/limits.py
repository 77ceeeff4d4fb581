"""What reaches the routes: whose requests, of which kind, how large, and how slow. Plain ASGI."""

from __future__ import annotations

import hmac
import ipaddress

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coreinfer_edge.serve.refusals import Refusal
from coreinfer_edge.serve.watch import ANSWERS

# They tell nothing that needs a key: the page asks for it.
OPEN_PATHS = ("/", "/health")


class Gate:
    """Lets the owner's requests in.

    Args:
        app: behind it.
        api_key: that a request must have; None if none is needed. Then the request must name a
            loopback host: a page of another site could otherwise reach the server through a name
            that it lets point here.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app, self._key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope["path"], Headers(scope=scope))
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await refusal.response()(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> Refusal | None:
        if self._key is None:
            if is_loopback(_host_name(headers.get("host", ""))):
                return None
            return Refusal(
                403,
                "without an API key only requests to localhost are answered: start the server with"
                " --api-key",
                "host_not_allowed",
            )
        if path in OPEN_PATHS:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        # headers are decoded as Latin-1; this gives the bytes that were sent
        right = hmac.compare_digest(given.strip().encode("latin-1"), self._key.encode("utf-8"))
        if kind.lower() == "bearer" and right:
            return None
        return Refusal(
            401,
            "give the API key of this server, as in 'Authorization: Bearer KEY'",
            "invalid_api_key",
            # the body is not read
            {"WWW-Authenticate": "Bearer", "Connection": "close"},
        )


class BodyLimit:
    """Reads the body before anything else sees the request, if it is JSON.

    Args:
        app: behind it.
        n_bytes: the most that a body may have.
        seconds: how long it may take to come.
    """

    def __init__(self, app: ASGIApp, n_bytes: int, seconds: float) -> None:
        self._app, self._n_bytes, self._seconds = app, n_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            if scope["path"] in ANSWERS:
                _check_json(headers)
            body = await self._body(headers, receive)
        except Refusal as refusal:
            # what is left of the body is not read
            refusal.headers["Connection"] = "close"
            await refusal.response()(scope, receive, send)
            return
        if body is None:
            return  # the client has gone
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, receive_again, send)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._n_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        n_bytes = 0
        with anyio.move_on_after(self._seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part = message.get("body", b"")
                parts.append(part)
                n_bytes += len(part)
                if n_bytes > self._n_bytes:
                    raise self._too_large()
                if not message.get("more_body", False):
                    return b"".join(parts)
        raise Refusal(
            408, f"the body of the request did not come within {self._seconds:g} s", "timeout"
        )

    def _too_large(self) -> Refusal:
        return Refusal(
            413, f"the body of a request may have {self._n_bytes} bytes", "body_too_large"
        )


def _check_json(headers: Headers) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # also because a page of another site can send every other kind without being asked
        raise Refusal(
            415,
            "send JSON, with the header 'Content-Type: application/json': this request has"
            f" {kind[:100] or 'none'}",
            "unsupported_content_type",
        )


def _host_name(host: str) -> str:
    """Without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
