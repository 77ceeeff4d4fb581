"""One answer at a time: who waits, who is sent away, who has gone, and how a server ends."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
from serving import LONGEST, Served, events, serving

from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.serve import turns
from coreinfer_edge.serve.server import bound

# an answer of many tokens
LONG = {"prompt": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10,", "max_tokens": 900, "temperature": 0}
SHORT = {"prompt": "b", "max_tokens": 2, "temperature": 0}


@contextmanager
def long_stream(served: Served) -> Iterator[Iterator[dict[str, Any]]]:
    """An answer under way, of which the first piece has come."""
    with (
        httpx.Client(base_url=served.url, timeout=LONGEST) as client,
        client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response,
    ):
        assert response.status_code == 200
        pieces = events(response)
        next(pieces)
        yield pieces


def is_running(served: Served) -> bool:
    return served.serving.turns.running is not None


def post(served: Served, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/completions", json=body, timeout=LONGEST)


def completion_tokens(served: Served) -> float:
    text = httpx.get(f"{served.url}/metrics").text
    (line,) = (
        line for line in text.splitlines() if line.startswith("coreinfer_completion_tokens_total ")
    )
    return float(line.split()[1])


def test_a_request_that_finds_no_place_is_told_when_to_come_again(demo_llm: EdgeLLM) -> None:
    with serving(demo_llm, queue=1) as served, ThreadPoolExecutor() as pool:
        with long_stream(served):
            waiting = pool.submit(post, served, SHORT)
            served.wait_until(lambda: served.serving.turns.waiting == 1)
            refused = post(served, SHORT)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert waiting.result(LONGEST).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_the_place_is_free_when_the_answer_has_been_sent(demo_llm: EdgeLLM, stream: bool) -> None:
    class Slow(ThreadPoolExecutor):
        """Its thread goes on for a while after the last piece."""

        def submit(self, compute: Any, /, *_: Any, **__: Any) -> Any:
            return super().submit(lambda: (compute(), time.sleep(0.1)))

    with serving(demo_llm, queue=0) as served, Slow(max_workers=1) as slow:
        served.serving.turns._thread = slow
        statuses = [post(served, {**SHORT, "stream": stream}).status_code for _ in range(3)]
        served.wait_idle()
    assert statuses == [200] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_place_within_a_token(demo_llm: EdgeLLM, stream: bool) -> None:
    with serving(demo_llm, queue=0) as served:
        if stream:
            with long_stream(served):
                pass
        else:
            before = demo_llm.llama.run
            served.hang_up(
                LONG,
                lambda: (run := demo_llm.llama.run) is not before and run.completion_tokens > 3,
            )
        served.wait_idle()
        assert 0 < completion_tokens(served) < 900
        assert post(served, SHORT).status_code == 200


def test_a_client_that_goes_while_it_waits_leaves_the_queue(demo_llm: EdgeLLM) -> None:
    with serving(demo_llm, queue=1) as served, long_stream(served):
        served.hang_up(SHORT, lambda: served.serving.turns.waiting)
        served.wait_until(lambda: served.serving.turns.waiting == 0)


def test_a_client_that_goes_during_a_long_prompt_frees_its_place(demo_llm: EdgeLLM) -> None:
    with serving(demo_llm, queue=0) as served:
        served.hang_up({"prompt": [500] * 1000}, lambda: is_running(served))
        served.wait_idle()
        assert completion_tokens(served) <= 1


def test_requests_are_answered_in_the_order_of_their_coming(demo_llm: EdgeLLM) -> None:
    order: list[int] = []

    def ask(i: int) -> None:
        assert post(served, SHORT).status_code == 200
        order.append(i)

    with serving(demo_llm) as served, ThreadPoolExecutor(max_workers=4) as pool:
        with long_stream(served):
            for i in range(4):
                pool.submit(ask, i)
                served.wait_until(lambda i=i: served.serving.turns.waiting == i + 1)
        pool.shutdown()
    assert order == [0, 1, 2, 3]


def test_clients_at_the_same_time_get_each_its_own_answer(demo_llm: EdgeLLM) -> None:
    prompts = [f"My number is {1234 + 77 * i}. Again, my number is" for i in range(24)]
    options = {"max_tokens": 8, "temperature": 0}
    expected = [demo_llm.generate(prompt, **options) for prompt in prompts]
    assert len(set(expected)) == 24

    async def ask(client: httpx.AsyncClient, i: int) -> str:
        body = {"prompt": prompts[i], **options}
        if i % 3 == 0:  # these hang up, and ask again
            with suppress(httpx.TimeoutException):
                await client.post("/v1/completions", json=body, timeout=0.02)
        if i % 2:
            return str(
                (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
            )

        text = ""
        body["stream"] = True
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        return text

    async def all_at_once(url: str) -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=LONGEST) as client:
            return list(await asyncio.gather(*(ask(client, i) for i in range(len(prompts)))))

    with serving(demo_llm, queue=64) as served:
        assert asyncio.run(all_at_once(served.url)) == expected


def test_a_piece_is_sent_at_once_and_not_with_the_next() -> None:
    with bound("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # asyncio sets TCP_NODELAY on no other


def test_the_first_pieces_are_passed_on_at_once_and_the_end_does_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "PAUSE", 3600.0)
    emitted: list[list[int]] = []
    passed_on = threading.Semaphore(0)

    class Job:
        deadline, cut, queue_seconds = time.monotonic() + 3600, None, 0.0

        def pieces(self) -> Iterator[dict[str, Any]]:
            for i in range(6):
                yield {"piece": i}
                if i < 2:
                    assert passed_on.acquire(timeout=LONGEST)

    async def emit(pieces: list[dict[str, Any]]) -> None:
        emitted.append([piece["piece"] for piece in pieces])
        passed_on.release()

    async def run() -> None:
        await turns.Turns(0, lambda job: None).run(Job(), emit)

    asyncio.run(run())
    assert emitted == [[0], [1], [2, 3, 4, 5]]


# --- limits of time ---


def test_an_answer_is_cut_at_the_time_limit(demo_llm: EdgeLLM) -> None:
    with serving(demo_llm, time_limit=0.3) as served:
        answer = post(served, LONG).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["coreinfer"]["cut"] == "time limit"
        assert answer["choices"][0]["text"]
        assert answer["usage"]["completion_tokens"] < 900


def test_a_request_that_waits_longer_than_the_time_limit_is_sent_away(demo_llm: EdgeLLM) -> None:
    with serving(demo_llm, time_limit=0.3) as served, ThreadPoolExecutor() as pool:
        first = pool.submit(post, served, LONG)
        served.wait_until(lambda: is_running(served))
        running = served.serving.turns.running
        assert running is not None
        running.deadline += 1  # it goes on while the other waits
        waited = post(served, SHORT)
        assert waited.status_code == 503
        assert waited.json()["error"]["code"] == "timeout"
        assert first.result(LONGEST).status_code == 200


def test_a_client_that_reads_nothing_keeps_nobody_waiting(demo_llm: EdgeLLM) -> None:
    with serving(demo_llm, queue=1) as served:
        # meanwhile the connection is open, and nothing is read from it
        deaf = {"prompt": "1, 2, 3,", "max_tokens": 100, "stream": True}
        served.hang_up(deaf, lambda: is_running(served) and post(served, SHORT).status_code == 200)


# --- the end of a server ---


def test_an_answer_under_way_is_finished_when_the_server_ends(demo_llm: EdgeLLM) -> None:
    with serving(demo_llm, grace=LONGEST) as served:
        with (
            httpx.Client(base_url=served.url, timeout=LONGEST) as client,
            client.stream(
                "POST", "/v1/completions", json={**LONG, "max_tokens": 100, "stream": True}
            ) as response,
        ):
            pieces = events(response)
            next(pieces)
            served.server.should_exit = True
            *_, last = pieces
        assert last["coreinfer"]["completion_tokens"] >= 100
        assert last["coreinfer"]["cut"] is None
        served.thread.join(LONGEST)
        assert not served.thread.is_alive()


def test_an_answer_that_takes_longer_is_cut_and_ends_as_a_stream_does(demo_llm: EdgeLLM) -> None:
    with serving(demo_llm, grace=0.2) as served:
        with long_stream(served) as pieces:
            served.server.should_exit = True
            *_, last = pieces  # ends with [DONE]
        assert last["choices"][0]["finish_reason"] == "length"
        assert last["coreinfer"]["cut"] == "shutdown"
        served.thread.join(LONGEST)
        assert not served.thread.is_alive()


def test_those_who_wait_are_sent_away_at_once_when_the_server_ends(demo_llm: EdgeLLM) -> None:
    with serving(demo_llm, grace=LONGEST) as served, ThreadPoolExecutor() as pool:
        with long_stream(served):
            waiting = pool.submit(post, served, SHORT)
            served.wait_until(lambda: served.serving.turns.waiting == 1)
            running = served.serving.turns.running
            served.server.should_exit = True
            response = waiting.result(LONGEST)
            assert served.serving.turns.running is running is not None
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "shutdown"
        assert "retry-after" in response.headers


def test_nothing_is_left_of_a_server_that_has_ended(demo_llm: EdgeLLM) -> None:
    before = threading.active_count()
    with serving(demo_llm) as served:
        assert post(served, SHORT).status_code == 200
    end = time.monotonic() + LONGEST
    while threading.active_count() > before:
        assert time.monotonic() < end, threading.enumerate()
        time.sleep(0.01)
    assert demo_llm.generate("b", max_tokens=2) is not None
