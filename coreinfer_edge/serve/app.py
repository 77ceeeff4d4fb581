"""The routes: OpenAI's interface, health, metrics, and the page."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

import anyio
from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.serve.answers import Answer
from coreinfer_edge.serve.limits import BodyLimit, Gate
from coreinfer_edge.serve.metrics import CONTENT_TYPE, Metrics
from coreinfer_edge.serve.refusals import (
    ErrorBody,
    Refusal,
    json_bytes,
    json_response,
    refusal_of,
)
from coreinfer_edge.serve.requests import ChatRequest, CompletionRequest
from coreinfer_edge.serve.turns import Turns
from coreinfer_edge.serve.watch import LOG_DETAILS, Watch

log = logging.getLogger("coreinfer_edge.serve")


@dataclass(frozen=True)
class ServeOptions:
    """How a server is to run.

    Attributes:
        name: what the model is called in answers.
        api_key: that requests must have; None for none, and requests from this machine only.
        queue: how many requests may wait for their turn.
        time_limit: seconds that a request may take, waiting included. Its answer is cut then.
        body_limit: bytes that the body of a request may have.
        body_seconds: how long it may take to come.
        grace: seconds that the answer under way has when the server is to end.
        cors: origins whose pages may use the server; ``*`` for all.
        log_prompts: write requests and answers to the log.
    """

    name: str
    api_key: str | None = None
    queue: int = 16
    time_limit: float = 600.0
    body_limit: int = 1 << 20
    body_seconds: float = 30.0
    grace: float = 30.0
    cors: Sequence[str] = ()
    log_prompts: bool = False


class Serving:
    """What the routes share.

    Attributes:
        llm: the model.
        options: of the server.
        turns: whose turn it is.
        metrics: the counts.
    """

    def __init__(self, llm: EdgeLLM, options: ServeOptions) -> None:
        self.llm, self.options = llm, options
        self.turns: Turns[Answer] = Turns(options.queue, lambda answer: self.metrics.add(answer))
        self.metrics = Metrics(self.turns)
        self._created = int(time.time())

    def answer(self, request: ChatRequest | CompletionRequest) -> Response:
        """The response to a request for an answer."""
        return _AnswerResponse(self, request)

    def model(self) -> dict[str, Any]:
        """The model as OpenAI lists it, with what the page wants to know."""
        llama = self.llm.llama
        return {
            "id": self.options.name,
            "object": "model",
            "created": self._created,
            "owned_by": "coreinfer-edge",
            "coreinfer": {
                "n_ctx": llama.n_ctx(),
                "density": llama.density,
                "core_sets": llama.may_be_auto,
                "whole": llama.may_be_whole,
                "chat": llama.why_no_chat is None,
            },
        }


class _AnswerResponse(Response):
    """Waits for its turn, sends what the model says as it comes, and gives up if nobody listens."""

    def __init__(self, serving: Serving, request: ChatRequest | CompletionRequest) -> None:
        super().__init__()
        self._serving, self._request = serving, request
        self._answer = Answer(
            serving.llm, request, serving.options.name, serving.options.time_limit
        )
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        options = self._serving.options
        if options.log_prompts:
            asked = self._request.model_dump(exclude_none=True)
            log.info("request: %s", json_bytes(asked).decode())
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(_cancel_when_gone, receive, group.cancel_scope)
                # a client that reads nothing is let go some time after its answer is over
                with anyio.move_on_after(options.time_limit + options.body_seconds):
                    await self._respond(scope, receive, send)
                group.cancel_scope.cancel()
        finally:
            scope[LOG_DETAILS] = self._details()

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        whole: list[dict[str, Any]] = []

        async def emit(pieces: list[dict[str, Any]]) -> None:
            if self._serving.options.log_prompts:
                log.info("answer: %s", json_bytes(pieces).decode())
            if not self._request.stream:
                whole.extend(pieces)
                return
            body = b"".join(b"data: " + json_bytes(piece) + b"\n\n" for piece in pieces)
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
            await send({"type": "http.response.body", "body": body, "more_body": True})

        last = b"data: [DONE]\n\n"
        try:
            await self._serving.turns.run(self._answer, emit)
            if not self._request.stream:
                await json_response(whole[0])(scope, receive, send)
                return
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status == 500:
                log_defect(error, self._serving.options.log_prompts)
            if not self._started:
                await refusal.response()(scope, receive, send)
                return
            last = b"data: " + json_bytes(refusal.body()) + b"\n\n"
        await send({"type": "http.response.body", "body": last})

    def _details(self) -> str:
        """The answer in figures, for the log."""
        answer, figures = self._answer, self._answer.figures
        words = [f"waited {answer.queue_seconds:.2f} s"]
        if figures is not None:
            words.append(f"{figures.prompt_tokens} + {figures.completion_tokens} tokens")
            words.append(f"density {figures.density:.2f}")
        if answer.cut:
            words.append(f"cut: {answer.cut}")
        return ", ".join(words)


_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would gather the pieces
]


async def _cancel_when_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def log_defect(error: BaseException, with_message: bool) -> None:
    """Where an unexpected error comes from; its message may quote a request."""
    where = "".join(traceback.format_tb(error.__traceback__))
    message = f": {error}" if with_message else " (--log-prompts shows its message)"
    log.error("unexpected %s%s\n%s", type(error).__name__, message, where)


_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request is not as it must be.",
        401: "The API key is missing or wrong.",
        403: "Without an API key: the request names a host that is not this machine.",
        408: "The body did not come in time.",
        413: "The body is too large.",
        415: "The body is no JSON by its Content-Type.",
        429: "The queue is full. Retry-After says when to come again.",
        500: "A defect.",
        503: "The server ends, or memory or time are over.",
    }.items()
}

_NO_SUCH_MODEL: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorBody, "description": "There is no model of that name."}
}

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream, server-sent events that end with [DONE].",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    },
    **_REFUSALS,
}


def create_app(serving: Serving) -> FastAPI:
    """The application, without a server."""
    options = serving.options

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(serving.turns.close)

    middleware = [
        Middleware(Watch, serving.metrics.count),
        Middleware(Gate, options.api_key),
        Middleware(BodyLimit, options.body_limit, options.body_seconds),
    ]
    if options.cors:
        # before the gate: a preflight has no key
        middleware.insert(
            1,
            Middleware(
                CORSMiddleware,
                allow_origins=list(options.cors),
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
            ),
        )
    app = FastAPI(
        title="CoreInfer Edge",
        # /docs would load its scripts from the net
        docs_url=None,
        redoc_url=None,
        middleware=middleware,
        lifespan=lifespan,
        # checked by the gate, before a body is read; here for the description
        dependencies=[Security(HTTPBearer(auto_error=False))] if options.api_key else [],
    )

    @app.post("/v1/chat/completions", response_class=Response, responses=_ANSWERS, tags=["OpenAI"])
    async def chat(body: ChatRequest) -> Response:
        """Answer a conversation."""
        return serving.answer(body)

    @app.post("/v1/completions", response_class=Response, responses=_ANSWERS, tags=["OpenAI"])
    async def complete(body: CompletionRequest) -> Response:
        """Continue a text."""
        return serving.answer(body)

    @app.get("/v1/models", tags=["OpenAI"])
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [serving.model()]}

    @app.get("/v1/models/{name:path}", responses=_NO_SUCH_MODEL, tags=["OpenAI"])
    async def model(name: str) -> dict[str, Any]:
        """The model, by its name."""
        if name != options.name:
            raise HTTPException(404, f"the model that is served is {options.name}")
        return serving.model()

    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["Operation"])
    async def health() -> dict[str, str]:
        """Whether the server can answer."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, tags=["Operation"])
    async def metrics() -> Response:
        """Counts in Prometheus' text form."""
        return Response(serving.metrics.text(), media_type=CONTENT_TYPE)

    page = resources.files("coreinfer_edge.serve").joinpath("page.html").read_text("utf-8")

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _invalid(error).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        why, path = str(error.detail), request.url.path[:100]
        if why == "Not Found":
            why = f"there is no {path} here: /openapi.json describes what there is"
        elif error.status_code == 405:
            why = f"{path} takes {(error.headers or {}).get('Allow')}, and no {request.method}"
        return Refusal(error.status_code, why, headers=error.headers).response()

    return app


# Scripts and styles are in the page, and it talks to its own server alone.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline';"
    " style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}


def _invalid(error: RequestValidationError) -> Refusal:
    """What is wrong with a request, and the first of the fields that are."""
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        why = errors[0]["ctx"]["error"]
        return Refusal(400, f"the body is no JSON: {why} at character {errors[0]['loc'][1]}")
    fields = [".".join(str(part) for part in item["loc"] if part != "body") for item in errors]
    found = [
        f"{field or 'the body'}: {item['msg']}"
        for field, item in zip(fields[:3], errors, strict=False)
    ]
    return Refusal(400, "; ".join(found), field=fields[0].partition(".")[0] or None)
