"""Who is let in, what is too large or too slow, and what the log may say."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
from serving import LONGEST, Served, serving

from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.serve.connections import HttpProtocol
from coreinfer_edge.serve.server import check_address, check_origins, log_to_stderr

KEY = "s3cret-ключ"
PATHS = ["/v1/models", "/v1/completions", "/v1/chat/completions", "/metrics", "/openapi.json"]


@pytest.fixture(scope="module")
def strict(base_llm: EdgeLLM) -> Iterator[Served]:
    """A server with a key, for pages of one origin, with small limits."""
    with serving(
        base_llm,
        api_key=KEY,
        cors=["https://chat.example"],
        body_limit=2000,
        body_seconds=0.4,
    ) as served:
        yield served


def raw(served: Served, *parts: bytes) -> bytes:
    """Send bytes as they are; what comes back until the server closes the connection."""
    host, port = served.url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=LONGEST) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:
            pass
    return answer


# --- the key ---


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}".encode()}],
    ids=["none", "wrong", "basic"],
)
def test_nothing_but_the_page_and_health_is_open_without_the_key(
    strict: Served, path: str, headers: dict[str, str]
) -> None:
    method = "POST" if "completions" in path else "GET"
    # the body is too large: it is not looked at before the key
    response = httpx.request(method, strict.url + path, headers=headers, content=b" " * 3000)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


def test_with_the_key_requests_are_answered(strict: Served) -> None:
    headers = {"Authorization": f"Bearer {KEY}".encode()}
    assert httpx.get(f"{strict.url}/v1/models", headers=headers).status_code == 200
    body = {"prompt": "a", "max_tokens": 2}
    response = httpx.post(f"{strict.url}/v1/completions", headers=headers, json=body)
    assert response.status_code == 200
    for path in ("/", "/health"):
        assert httpx.get(strict.url + path).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "pi.local", "127.evil.example"])
def test_another_address_than_loopback_needs_a_key(host: str) -> None:
    with pytest.raises(ArgumentError, match="--api-key"):
        check_address(host, None)
    with pytest.raises(ArgumentError, match="empty"):
        check_address(host, "")
    check_address(host, KEY)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_loopback_needs_no_key(host: str) -> None:
    check_address(host, None)


def test_without_a_key_a_name_that_is_made_to_point_here_reaches_nothing(demo: Served) -> None:
    port = demo.url.rsplit(":", 1)[1]
    for host in ("evil.example", f"evil.example:{port}", "127.evil.example", ""):
        response = httpx.get(f"{demo.url}/v1/models", headers={"Host": host})
        assert response.status_code == 403
    for host in ("localhost", f"LOCALHOST:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        response = httpx.get(f"{demo.url}/v1/models", headers={"Host": host})
        assert response.status_code == 200


# --- pages of other sites ---


def test_pages_of_other_origins_are_let_in_only_if_named(strict: Served, demo: Served) -> None:
    def preflight(served: Served, origin: str) -> httpx.Response:
        return httpx.options(
            f"{served.url}/v1/chat/completions",
            headers={
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type",
            },
        )

    named = preflight(strict, "https://chat.example")
    assert named.headers["access-control-allow-origin"] == "https://chat.example"
    assert "access-control-allow-origin" not in preflight(strict, "https://evil.example").headers
    assert "access-control-allow-origin" not in preflight(demo, "https://chat.example").headers


@pytest.mark.parametrize("origin", ["https://chat.example/", "chat.example", "a b", "", "HTTP://A"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ArgumentError, match="is no origin"):
        check_origins(["https://chat.example", origin])
    with pytest.raises(ArgumentError, match="null lets in each file"):
        check_origins(["null"])
    check_origins(["*", "http://localhost:3000", "http://[::1]:3000", "app://obsidian.md"])


def test_a_form_of_another_site_makes_the_model_compute_nothing(demo: Served) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 5})
    kinds = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a")
    for kind in (*kinds, None):  # a Blob without a type has none
        headers = {"Content-Type": kind} if kind else {}
        response = httpx.post(f"{demo.url}/v1/completions", content=body, headers=headers)
        assert response.status_code == 415
        error = response.json()["error"]
        assert error["code"] == "unsupported_content_type"
        assert f"this request has {(kind or 'none').partition(';')[0]}" in error["message"]
        assert "application/json" in error["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
def test_the_kind_of_a_body_may_name_its_character_set(demo: Served, kind: str) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1})
    headers = {"Content-Type": kind}
    response = httpx.post(f"{demo.url}/v1/completions", content=body, headers=headers)
    assert response.status_code == 200


# --- bodies ---


def test_a_body_that_is_too_large_is_refused(strict: Served) -> None:
    headers = {"Authorization": f"Bearer {KEY}".encode(), "Content-Type": "application/json"}
    url = f"{strict.url}/v1/completions"
    told = httpx.post(url, headers=headers, content=b" " * 2001)
    assert told.status_code == 413
    assert told.json()["error"]["code"] == "body_too_large"

    def chunks() -> Iterator[bytes]:  # without a length
        for _ in range(30):
            yield b" " * 100

    with suppress(httpx.TransportError):  # the connection may be closed while it sends
        assert httpx.post(url, headers=headers, content=chunks()).status_code == 413
    ok = httpx.post(url, headers=headers, content=b'{"prompt": "a", "max_tokens": 1}')
    assert ok.status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(strict: Served) -> None:
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    )
    answer = raw(strict, head.encode("utf-8"), b'{"prompt"')
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"timeout" in answer


def test_a_head_that_does_not_come_is_not_waited_for(
    base_llm: EdgeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HttpProtocol, "head_seconds", 0.2)
    with serving(base_llm) as served:
        assert raw(served) == b""
        assert raw(served, b"POST /v1/comp") == b""
        request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        answer = raw(served, request, b"GET /hea")
        assert answer.count(b"HTTP/1.1 200") == 1
        assert httpx.get(f"{served.url}/health").status_code == 200


GARBAGE = {
    "no HTTP": b"\x00\xff\xfe garbage\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + b"x" * 200,
    "a huge head": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
    "a negative length": b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_is_refused_and_the_server_lives(demo: Served, case: str) -> None:
    answer = raw(demo, GARBAGE[case])
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert httpx.get(f"{demo.url}/health").status_code == 200


BODIES = {
    "empty": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "quality": Infinity}',
    "a huge number": b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}",
    "deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "an array": b"[]",
    "a null": b"null",
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("case", BODIES)
def test_a_body_of_garbage_is_refused(demo: Served, case: str, path: str) -> None:
    response = httpx.post(
        demo.url + path,
        content=BODIES[case],
        headers={"Content-Type": "application/json"},
        timeout=LONGEST,
    )
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_a_body_that_is_no_json_is_told_where(demo: Served) -> None:
    headers = {"Content-Type": "application/json"}
    content = b'{"prompt": "a",}'
    response = httpx.post(f"{demo.url}/v1/completions", content=content, headers=headers)
    message = response.json()["error"]["message"]
    assert message.startswith("the body is no JSON: ")
    assert re.search(r" at character 1[45]$", message)


@pytest.mark.parametrize("text", ["a", " ", "\n", "1", "é", "🙂", "a ", "<|im_start|>"])
def test_a_huge_prompt_is_refused_and_the_server_lives(demo: Served, text: str) -> None:
    # one is refused by its length, the other by its tokens
    huge, large = (text * (n // len(text.encode())) for n in (450_000, 120_000))
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": huge}]}]}
    for path, body in (("completions", {"prompt": huge}), ("chat/completions", chat)):
        response = httpx.post(f"{demo.url}/v1/{path}", json=body, timeout=LONGEST)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
    many = {"messages": [{"role": "user", "content": text}] * 10_000}
    response = httpx.post(f"{demo.url}/v1/chat/completions", json=many, timeout=LONGEST)
    assert response.json()["error"]["code"] == "context_length_exceeded"
    body = {"prompt": large, "max_tokens": 1}
    response = httpx.post(f"{demo.url}/v1/completions", json=body, timeout=LONGEST)
    assert response.json()["error"]["code"] == "context_length_exceeded"


FORMS = {
    "many items": {"type": "array", "items": {}, "minItems": 10**8},
    "a long text": {"type": "string", "minLength": 10**8},
    "many values": {"enum": [str(i) for i in range(50_000)]},
    "deep brackets": {"type": "string", "pattern": "^" + "(" * 5000 + "a" + ")" * 5000 + "$"},
}


@pytest.mark.parametrize("case", FORMS)
def test_a_form_that_would_end_the_process_is_refused_and_the_server_lives(
    demo: Served, case: str
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": FORMS[case]}}
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 2,
        "response_format": form,
    }
    response = httpx.post(f"{demo.url}/v1/chat/completions", json=body, timeout=LONGEST)
    assert response.status_code == 400
    brackets = {"prompt": "a", "grammar": "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000}
    assert httpx.post(f"{demo.url}/v1/completions", json=brackets).status_code == 400
    assert httpx.get(f"{demo.url}/health").status_code == 200


# --- the log ---


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log_has_nothing_of_a_prompt_unless_asked(
    demo_llm: EdgeLLM, log_prompts: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    loggers = [logging.getLogger(name) for name in ("coreinfer_edge.serve", "uvicorn")]
    before = [(log.handlers, log.propagate, log.level) for log in loggers]
    log_to_stderr(log_prompts)
    try:
        with (
            serving(demo_llm, log_prompts=log_prompts) as served,
            httpx.Client(base_url=served.url, timeout=LONGEST) as client,
        ):
            body = {"prompt": "Xyzzy plugh", "max_tokens": 2}
            assert client.post("/v1/completions", json=body).status_code == 200
            body["density"] = 7
            assert client.post("/v1/completions", json=body).status_code == 400
            chat = {"messages": [{"role": "Xyzzy", "content": "Xyzzy"}]}
            assert client.post("/v1/chat/completions", json=chat).status_code == 400
            assert client.get("/Xyzzy", params={"Xyzzy": "Xyzzy"}).status_code == 404
    finally:
        for log, (log.handlers, log.propagate, level) in zip(loggers, before, strict=True):
            log.setLevel(level)
    logged = capsys.readouterr().err
    assert "/v1/completions: 200" in logged
    assert ("Xyzzy" in logged) is log_prompts


def test_a_defect_is_logged_without_its_message_and_told_without_it(
    demo_llm: EdgeLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from coreinfer_edge.serve.answers import Answer

    def failing(answer: Answer) -> Iterator[object]:
        yield from ()
        raise ZeroDivisionError("Xy" + "zzy")

    monkeypatch.setattr(Answer, "pieces", failing)
    caplog.set_level(logging.DEBUG)
    with serving(demo_llm) as served:
        response = httpx.post(f"{served.url}/v1/completions", json={"prompt": "a"})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "ZeroDivisionError" in caplog.text
    assert "in failing" in caplog.text
    assert "Xyzzy" not in response.text + caplog.text
