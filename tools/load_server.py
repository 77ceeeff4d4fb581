"""The server under load: wrong answers, leaks, and what it costs beside EdgeLLM.

    python tools/load_server.py [MODEL] [--only crowd,many,cost] [--seconds 120] [--requests 10000]

Starts ``coreinfer-edge serve`` as a process of its own, and prints one JSON object:

Its exit status is 1 if an answer was wrong or the server ended by itself.

- ``crowd``: 64 clients that ask at once for some time, a third of the requests hung up at random.
- ``many``: many requests from a few clients, with the memory, threads and open files of the server
  on the way.
- ``cost``: time to the first token and tokens per second beside EdgeLLM's, with an empty queue,
  streamed and not. Run it under ``chrt -r 1`` where other programs are busy.

Each prompt asks for a number of its own, and each answer is compared with EdgeLLM's: one that is
mixed up with another, cut or damaged is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil

from coreinfer_edge.run.llm import EdgeLLM

TOKENS = 5
N_CTX = 1024
HANG_UP = 1 / 3  # of the requests of a crowd
PATIENCE = 600.0  # seconds for an answer


class Server:
    """``coreinfer-edge serve``, and what its process takes."""

    def __init__(self, model: str, queue: int, threads: int) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        options = ["--queue", str(queue), "--ctx", str(N_CTX), "--threads", str(threads)]
        options += ["--port", "0"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "coreinfer_edge.cli.main", "serve", model, *options],
            stderr=self._log,
        )
        while not (found := re.search(r"answers at (\S+)", self._logged())):
            if not self.alive:
                raise SystemExit(self._logged())
            time.sleep(0.1)
        self.url = found[1]
        self._state = psutil.Process(self._process.pid)

    def _logged(self) -> str:
        self._log.seek(0)
        return self._log.read()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def state(self) -> dict[str, int]:
        """Memory, threads and open files of the process."""
        return {
            "rss_kib": self._state.memory_info().rss >> 10,
            "threads": self._state.num_threads(),
            "files": self._state.num_fds(),
        }

    def end(self) -> dict[str, Any]:
        """End it; how that went, and what is in its log besides the lines of requests."""
        self._process.terminate()
        status = self._process.wait(60)
        said = [line for line in self._logged().splitlines()[1:] if " INFO " not in line]
        refused = [line for line in said if " WARNING " not in line]
        return {"exit_status": status, "log": refused[:5]}


class Asker:
    """Asks the prompts, and counts how the answers are."""

    def __init__(self, url: str, expected: dict[str, str]) -> None:
        self._url, self._expected = url, expected
        self._draw = random.Random(0)
        self.counts: Counter[str] = Counter()
        self.wrong: list[dict[str, str]] = []

    async def ask(self, client: httpx.AsyncClient, hang_up: bool) -> None:
        """One request; with ``hang_up`` it is given up at a random time."""
        prompt = self._draw.choice(list(self._expected))
        stream = self._draw.random() < 0.5
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": stream}
        answer = self._streamed(client, body) if stream else self._whole(client, body)
        try:
            if hang_up:
                text = await asyncio.wait_for(answer, self._draw.expovariate(1 / 0.5))
            else:
                text = await answer
        except asyncio.TimeoutError:
            self.counts["hung up"] += 1
            return
        except Busy as busy:
            self.counts["sent away"] += 1
            await asyncio.sleep(busy.seconds * self._draw.random())
            return
        except httpx.HTTPError as error:
            self.counts[f"failed: {type(error).__name__}"] += 1
            return
        if text == self._expected[prompt]:
            self.counts["right"] += 1
        else:
            self.counts["wrong"] += 1
            self.wrong.append({"prompt": prompt, "answer": text})

    async def _whole(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        response = await client.post(f"{self._url}/v1/completions", json=body)
        _check(response)
        return str(response.json()["choices"][0]["text"])

    async def _streamed(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        text, done = "", False
        async with client.stream("POST", f"{self._url}/v1/completions", json=body) as response:
            _check(response)
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line:
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        return text if done else f"{text} (without an end)"


class Busy(Exception):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


def _check(response: httpx.Response) -> None:
    if response.status_code == 429:
        raise Busy(float(response.headers["Retry-After"]))
    response.raise_for_status()


async def crowd(asker: Asker, n_clients: int, seconds: float) -> None:
    """Clients that ask all the time."""
    end = time.monotonic() + seconds

    async def one() -> None:
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            while time.monotonic() < end:
                await asker.ask(client, asker._draw.random() < HANG_UP)

    await asyncio.gather(*(one() for _ in range(n_clients)))


async def many(
    asker: Asker, n_requests: int, state: Callable[[], dict[str, int]], n_clients: int
) -> list[dict[str, int]]:
    """So many requests, a tenth of them hung up; the state of the server ten times on the way."""
    left, noted = n_requests, []

    async def one() -> None:
        nonlocal left
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            while left > 0:
                left -= 1
                if left % (n_requests // 10) == 0:
                    noted.append({"requests": n_requests - left, **state()})
                await asker.ask(client, asker._draw.random() < 0.1)

    await asyncio.gather(*(one() for _ in range(n_clients)))
    return noted


def cost(url: str, llm: EdgeLLM, rounds: int) -> dict[str, Any]:
    """Time to the first token, and tokens per second: EdgeLLM, the server, EdgeLLM, ...

    A stream's tokens per second are those after the first, up to its end; those of an answer in one
    piece are all of them, by the whole time.
    """
    asked: dict[str, Any] = {"max_tokens": 64, "temperature": 0}
    connection = http.client.HTTPConnection(url.removeprefix("http://"))

    def response_to(prompt: str, stream: bool) -> http.client.HTTPResponse:
        body = json.dumps({"prompt": prompt, "stream": stream, **asked})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        return connection.getresponse()

    def server_pieces(prompt: str) -> Iterator[bytes]:
        # in bytes as they come: a client that takes them apart would take time from the server
        response = response_to(prompt, True)
        while piece := response.read1():
            yield piece

    def streamed(start: Callable[[str], Iterator[Any]]) -> Callable[[str], tuple[float, float]]:
        def timed(prompt: str) -> tuple[float, float]:
            began = time.perf_counter()
            pieces = start(prompt)
            next(pieces)
            first = time.perf_counter()
            for _ in pieces:
                pass
            return first - began, (asked["max_tokens"] - 1) / (time.perf_counter() - first)

        return timed

    def whole(ask: Callable[[str], Any]) -> Callable[[str], tuple[float, float]]:
        def timed(prompt: str) -> tuple[float, float]:
            began = time.perf_counter()
            ask(prompt)
            return 0.0, asked["max_tokens"] / (time.perf_counter() - began)

        return timed

    ways = {
        "streamed": (
            streamed(lambda prompt: llm.stream(prompt, **asked)),
            streamed(server_pieces),
        ),
        "whole": (
            whole(lambda prompt: llm.generate(prompt, **asked)),
            whole(lambda prompt: json.loads(response_to(prompt, False).read())),
        ),
    }
    result: dict[str, Any] = {"rounds": rounds}
    for way, (of_llm, of_server) in ways.items():
        pairs = []
        for i in range(rounds + 1):
            prompt = f"Day {i}, {way}. The history of Rome begins with"  # one that is in no cache
            pairs.append((of_llm(prompt), of_server(prompt)))
        pairs.pop(0)  # both grow warm
        median = statistics.median
        result[way] = {
            "edge_llm_tokens_per_second": median(a[1] for a, _ in pairs),
            "server_tokens_per_second": median(b[1] for _, b in pairs),
            "ratio": median(b[1] / a[1] for a, b in pairs),
        }
        if way == "streamed":
            result["first_token_ms"] = {
                "edge_llm": 1000 * median(a[0] for a, _ in pairs),
                "server": 1000 * median(b[0] for _, b in pairs),
                "later": 1000 * median(b[0] - a[0] for a, b in pairs),
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="The server under load.")
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--only", default="crowd,many,cost")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    result: dict[str, Any] = {"model": args.model}
    bad = False
    threads = args.threads
    with EdgeLLM(args.model, n_ctx=N_CTX, n_threads=threads, n_threads_batch=threads) as llm:
        texts = [f"Number {1009 + 37 * i}. Again: number" for i in range(args.prompts)]
        expected = {text: llm.generate(text, max_tokens=TOKENS, temperature=0) for text in texts}
        result["different_answers"] = len(set(expected.values()))
        for part in args.only.split(","):
            queue = args.clients if part == "many" else 16
            server = Server(args.model, queue, threads)
            asker = Asker(server.url, expected)
            noted: list[dict[str, int]] = []
            began = time.monotonic()
            if part == "cost":
                found = cost(server.url, llm, args.rounds)
            else:
                if part == "crowd":
                    asyncio.run(crowd(asker, args.clients, args.seconds))
                    noted.append(server.state())
                else:
                    noted += asyncio.run(many(asker, args.requests, server.state, n_clients=8))
                found = {**asker.counts, "examples": asker.wrong[:5], "server": noted}
            alive = server.alive
            ended = server.end()
            seconds = time.monotonic() - began
            result[part] = {**found, "seconds": seconds, "alive": alive, **ended}
            bad |= not alive or asker.counts["wrong"] > 0
            print(f"{part}: {json.dumps(result[part])}", file=sys.stderr)
    print(json.dumps(result))
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
