"""One generation at a time, on a thread of its own; the others wait in a queue with few places."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

import anyio

from coreinfer_edge.serve.refusals import Refusal

# How much the last answer counts in the mean of their times.
_NEWEST = 0.2

_END = object()


class Job(Protocol):
    """One generation.

    Attributes:
        deadline: when it has to be over, of ``time.monotonic``.
        cut: why it is to end with its next token; None as long as it may go on.
        queue_seconds: how long it waited.
    """

    deadline: float
    cut: str | None
    queue_seconds: float

    def pieces(self) -> Iterator[dict[str, Any]]:
        """Compute; runs in the thread, and looks at ``cut`` and ``deadline`` before each token."""
        ...


# Takes the pieces that there are by now.
Emit = Callable[[list[dict[str, Any]]], Awaitable[None]]

AnyJob = TypeVar("AnyJob", bound=Job)


class Turns(Generic[AnyJob]):
    """Whose turn it is.

    Args:
        places: how many may wait, besides the one that computes.
        over: called with each job that has computed, also for a client that has gone.

    Attributes:
        waiting: how many do.
        running: the job that computes.
    """

    def __init__(self, places: int, over: Callable[[AnyJob], None]) -> None:
        self.waiting = 0
        self.running: AnyJob | None = None
        self._places, self._tell = places, over
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")
        self._closing: str | None = None
        self._began = 0.0
        self._seconds = 1.0  # mean time of an answer

    async def run(
        self, job: AnyJob, emit: Callable[[list[dict[str, Any]]], Awaitable[None]]
    ) -> None:
        """Wait for the turn of a job, and pass on its pieces as they come.

        If this is cancelled the job ends with its next token, and only then is it another's turn.

        Raises:
            Refusal: there is no place, the deadline has passed, or the server ends.
            Exception: what ``pieces`` raises.
        """
        self._check_open()
        if self._turn.locked() and self.waiting >= self._places:
            raise self._busy()
        came = time.monotonic()
        await self._wait(job.deadline - came)
        job.queue_seconds = time.monotonic() - came
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def compute() -> None:
            def put(piece: Any) -> None:
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

            try:
                for piece in job.pieces():
                    put(piece)
            except Exception as error:
                put(error)

        def over(_: object) -> None:
            # first the place: a client that has its whole answer may ask again at once
            self._over()
            pieces.put_nowait(_END)

        self.running, self._began = job, time.monotonic()
        loop.run_in_executor(self._thread, compute).add_done_callback(over)
        try:
            error = await _pass_on(pieces, emit)
        except BaseException:
            job.cut = job.cut or "gone"
            raise
        if error is not None:
            raise error

    async def _wait(self, seconds: float) -> None:
        self.waiting += 1
        mine = False
        try:
            # not asyncio.wait_for: before Python 3.12 it can lose a lock that it has got
            with anyio.move_on_after(max(0.0, seconds)):
                mine = await self._turn.acquire()
        finally:
            self.waiting -= 1
        if not mine:
            raise Refusal(
                503,
                "the time limit passed while this request waited for its turn: try again later",
                "timeout",
                {"Retry-After": str(self.retry_after)},
            )
        if self._closing is not None:
            self._turn.release()
            self._check_open()

    def _over(self) -> None:
        assert self.running is not None
        self._seconds += _NEWEST * (time.monotonic() - self._began - self._seconds)
        job, self.running = self.running, None
        self._turn.release()
        self._tell(job)

    def _busy(self) -> Refusal:
        return Refusal(
            429,
            f"{self.waiting} requests wait already, and there are no more places: try again later",
            "queue_full",
            {"Retry-After": str(self.retry_after)},
        )

    @property
    def retry_after(self) -> int:
        """Seconds after which a place should be free."""
        return max(1, round(self._seconds))

    # --- the end ---

    def _check_open(self) -> None:
        if self._closing is not None:
            raise Refusal(503, self._closing, "shutdown", {"Retry-After": "10"})

    def refuse(self, why: str) -> None:
        """Begin no more generations; the one that computes goes on."""
        self._closing = self._closing or why

    def cut(self, why: str) -> None:
        """As ``refuse``, and end the one that computes with its next token."""
        self.refuse(why)
        if self.running is not None:
            self.running.cut = self.running.cut or "shutdown"

    def close(self) -> None:
        """Wait until nothing computes any more."""
        self.cut("the server has ended")
        self._thread.shutdown()


async def _pass_on(pieces: asyncio.Queue[Any], emit: Emit) -> Exception | None:
    """Emit all pieces; the error that ended them."""
    error = None
    while True:
        ready = [await pieces.get()]
        while not pieces.empty():
            ready.append(pieces.get_nowait())
        if known := [piece for piece in ready if isinstance(piece, dict)]:
            await emit(known)
        error = next((piece for piece in ready if isinstance(piece, Exception)), error)
        if ready[-1] is _END:
            return error
