"""``coreinfer-edge serve``: answer over HTTP, as OpenAI's interface does."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated

import typer

from coreinfer_edge.cli.interrupts import ends_when_terminated
from coreinfer_edge.cli.options import ChatFormat, Model, ModelOptions, Verbose, takes_options
from coreinfer_edge.cli.output import reports_errors
from coreinfer_edge.errors import MissingPackageError

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True)
class ServeCommandOptions(ModelOptions):
    chat_format: ChatFormat = None
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 is any free one.")] = 8080
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="COREINFER_API_KEY",
            help="Key that requests must have; needed where --host lets other machines in.",
            show_default=False,
        ),
    ] = None
    name: Annotated[
        str | None,
        typer.Option(help="Name of the model in answers.", show_default="the file's"),
    ] = None
    queue: Annotated[int, typer.Option(min=0, help="How many requests may wait.")] = 16
    time_limit: Annotated[
        float, typer.Option(min=1, help="Seconds for a request; its answer is cut then.")
    ] = 600
    body_limit: Annotated[
        int, typer.Option(min=1024, help="Most bytes that a request may have.")
    ] = 1 << 20
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds for the answer under way at the end.")
    ] = 30
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="Let pages of this origin in. Repeatable.", show_default=False
        ),
    ] = None
    log_prompts: Annotated[bool, typer.Option(help="Write requests and answers to the log.")] = (
        False
    )


@reports_errors
@takes_options
def serve(model: Model, *, options: ServeCommandOptions, verbose: Verbose = False) -> None:
    """Answer over HTTP: OpenAI's interface under /v1, and a page for a chat at /."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"serve needs {', '.join(missing)}: pip install 'coreinfer-edge[server]'"
        )
    from coreinfer_edge.model.source import resolve
    from coreinfer_edge.serve import server
    from coreinfer_edge.serve.app import ServeOptions

    server.check_address(options.host, options.api_key)
    server.check_origins(options.cors or ())
    settings = ServeOptions(
        name=options.name or PurePath(model).stem,
        api_key=options.api_key,
        queue=options.queue,
        time_limit=options.time_limit,
        body_limit=options.body_limit,
        grace=options.grace,
        cors=options.cors or (),
        log_prompts=options.log_prompts,
    )
    path = resolve(model)
    server.log_to_stderr(options.log_prompts)
    with (
        ends_when_terminated(),
        server.bound(options.host, options.port) as listener,
        options.open_model(
            path, verbose, **server.mapping(path, options.n_ctx, options.memory)
        ) as llm,
    ):
        address, port = listener.getsockname()[:2]
        where = f"[{address}]" if ":" in address else address
        line = f"{settings.name} answers at http://{where}:{port}"
        server.serve(llm, listener, settings, lambda: print(line, file=sys.stderr, flush=True))
