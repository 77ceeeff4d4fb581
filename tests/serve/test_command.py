"""``coreinfer-edge serve`` as a process: its address, its end, and a model file that changes."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import LONGEST, events
from typer.testing import CliRunner

from coreinfer_edge.cli.main import app
from coreinfer_edge.run.llm import EdgeLLM

COMMAND = [sys.executable, "-m", "coreinfer_edge.cli.main", "serve"]
LONG = {"prompt": "1, 2, 3, 4, 5,", "max_tokens": 900, "temperature": 0, "stream": True}


@contextmanager
def process(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, and the address that it tells when it is ready."""
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments), "--port", "0"], stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            assert running.stderr is not None
            line = running.stderr.readline()
            found = re.fullmatch(r"(\w+) answers at (http://127\.0\.0\.1:\d+)\n", line)
            assert found, line + running.stderr.read()
            # what is written there has to be read
            threading.Thread(target=running.stderr.read, daemon=True).start()
            yield running, found[2]
        finally:
            running.kill()


def text_of(url: str, **body: Any) -> str:
    body = {"prompt": "The history of Rome", "max_tokens": 16, "temperature": 0, **body}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=LONGEST)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_server_and_the_answer_under_way_ends_as_a_stream_does(
    number: int, status: int
) -> None:
    with process("demo", "--ctx", "1024", "--grace", "0.3") as (running, url):
        with (
            httpx.Client(base_url=url, timeout=LONGEST) as client,
            client.stream("POST", "/v1/completions", json=LONG) as response,
        ):
            pieces = events(response)
            next(pieces)
            running.send_signal(number)
            *_, last = pieces
        assert last["coreinfer"]["cut"] == "shutdown"
        assert running.wait(LONGEST) == status


@pytest.mark.parametrize("options", [[], ["--density", "1"]], ids=["packed", "as llama.cpp"])
def test_a_model_file_can_be_replaced_or_written_to_while_it_is_served(
    smollm2: Path, tmp_path: Path, options: list[str]
) -> None:
    model, same = tmp_path / "m.gguf", tmp_path / "same.gguf"
    shutil.copy(smollm2, model)
    os.link(model, same)
    with process(model, *options, "--ctx", "512") as (_, url):
        before = text_of(url)
        (tmp_path / "new.gguf").write_bytes(b"another model")
        os.replace(tmp_path / "new.gguf", model)
        assert text_of(url) == before
        same.write_bytes(b"in its place")  # of the file that was loaded
        assert text_of(url) == before
        body = {"prompt": LONG["prompt"], "temperature": 0, "density": 0.5, "max_tokens": 100}
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=LONGEST)
        if not options:  # a core set is read from the file
            assert response.status_code == 503
            assert "since it was loaded" in response.json()["error"]["message"]
        assert text_of(url) == before


def test_options_of_the_model_and_the_server_are_taken(smollm2: Path) -> None:
    options = ["--density", "0.5", "--ctx", "512", "--name", "mine", "--threads", "1"]
    with process(smollm2, *options) as (_, url):
        (model,) = httpx.get(f"{url}/v1/models").json()["data"]
        assert (model["id"], model["coreinfer"]["density"]) == ("mine", 0.5)
        assert model["coreinfer"]["n_ctx"] == 512


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_an_address_that_cannot_be_served_is_refused_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: Any, **__: Any) -> None:
        pytest.fail("the model is loaded")

    monkeypatch.setattr(EdgeLLM, "__init__", load)
    assert "--api-key" in refused("demo", "--host", "0.0.0.0")
    with taken_port() as port:
        assert f"port {port} of 127.0.0.1" in refused("demo", "--port", str(port))
    assert "--cors a.example is no origin" in refused("demo", "--cors", "a.example")
    assert "no.such.host.invalid" in refused(
        "demo", "--host", "no.such.host.invalid", "--api-key", "k"
    )


def test_missing_packages_are_named_with_the_extra_that_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    assert "serve needs uvicorn: pip install 'coreinfer-edge[server]'" in refused("demo")
