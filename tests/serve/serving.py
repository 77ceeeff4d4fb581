"""A server in a thread, as the tests of the server use it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.serve.app import ServeOptions, Serving
from coreinfer_edge.serve.server import Server, bound

LONGEST = 60.0


@dataclass
class Served:
    """A server that runs.

    Attributes:
        url: its address.
        server: uvicorn's; ``should_exit`` ends it.
        serving: what the routes share.
        thread: that it runs in.
    """

    url: str
    server: Server
    serving: Serving
    thread: threading.Thread

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Fail if it does not become true."""
        end = time.monotonic() + LONGEST
        while not condition():
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.005)

    def hang_up(self, body: dict[str, Any], condition: Callable[[], object]) -> None:
        """Ask for a completion, and close the connection when the condition is true."""
        host, port = self.url.removeprefix("http://").split(":")
        content = json.dumps(body).encode()
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
                b"Content-Type: application/json\r\n\r\n%s" % (len(content), content)
            )
            self.wait_until(condition)

    def wait_idle(self) -> None:
        """Until nothing computes, and nobody waits."""
        turns = self.serving.turns
        self.wait_until(lambda: turns.running is None and turns.waiting == 0)


@contextmanager
def serving(llm: EdgeLLM, **options: Any) -> Iterator[Served]:
    options.setdefault("name", "model")
    with bound("127.0.0.1", 0) as listener:
        server = Server(llm, ServeOptions(**options))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        served = Served(url, server, server.serving, thread)
        served.wait_until(lambda: server.started)
        try:
            yield served
        finally:
            server.should_exit = True
            thread.join(LONGEST)
            assert not thread.is_alive(), "the server does not end"
            server.close()


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The chunks of a stream, which must end as OpenAI's do."""
    done = False
    for line in response.iter_lines():
        if line:
            assert line.startswith("data: ")
            assert not done
            if line == "data: [DONE]":
                done = True
            else:
                yield json.loads(line[6:])
    assert done


def streamed(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        return list(events(response))
