"""Refused requests: the status and OpenAI's JSON for each error."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from coreinfer_edge.errors import (
    ArgumentError,
    CoreInferError,
    InsufficientMemoryError,
    ModelFileError,
    PromptTooLongError,
    UnsupportedModelError,
)


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """What a refused request is answered."""

    error: ErrorDetails


class Refusal(Exception):
    """A request that is not answered.

    Attributes:
        status: the HTTP status.
        message: for the client: what is wrong, and what to do. It may quote the request.
        code: OpenAI's word for it.
        field: of the request that is wrong, if it is one.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.field = status, message, code, field
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        told = {"message": self.message, "type": kind, "param": self.field, "code": self.code}
        return {"error": told}

    def response(self) -> Response:
        """The whole response."""
        return json_response(self.body(), self.status, self.headers)


def refusal_of(error: Exception) -> Refusal:
    """What a client is told of an error during its answer."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, PromptTooLongError):
        return Refusal(400, _with_option_names(str(error)), "context_length_exceeded")
    if isinstance(error, InsufficientMemoryError):
        message = _with_option_names(str(error))
        return Refusal(503, message, "insufficient_memory", {"Retry-After": "10"})
    if isinstance(error, ModelFileError):
        # it was written to, and a core set is read from it
        return Refusal(503, str(error), "model_file")
    if isinstance(error, ArgumentError | UnsupportedModelError):
        return Refusal(400, _with_option_names(str(error)))
    if isinstance(error, CoreInferError):
        return Refusal(500, str(error))
    return Refusal(500, f"unexpected {type(error).__name__}: please report this defect")


def _with_option_names(message: str) -> str:
    """What a request cannot change, by the option of the server that does."""
    # as our messages have it, and not a name that one quotes from the request
    message = re.sub(r"\b(smaller|larger) n_ctx\b", r"\1 --ctx of the server", message)
    return re.sub(r"\bchat_format=(?:'([^']*)'|(\S+))", r"--chat-format \1\2", message)


_encoded = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def json_bytes(value: Any) -> bytes:
    """JSON in ASCII alone: a request may hold half of a surrogate pair, which UTF-8 has not."""
    return _encoded(value).encode("ascii")


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(json_bytes(value), status, dict(headers or {}), media_type="application/json")
