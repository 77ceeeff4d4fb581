"""One generation at a time, on a thread of its own; the others wait in a queue with few places."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

import anyio

from coreinfer_edge.serve.refusals import Refusal

# How much the last answer counts in the mean of their times.
_NEWEST = 0.2

# Seconds between two looks at what has been computed. Waking the loop for each token of a fast
# model takes 8 % of a processor's time, and the two threads share the interpreter.
PAUSE = 0.03
# A chat begins with a piece that has no text.
_AT_ONCE = 2

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
        self._waits: set[anyio.CancelScope] = set()
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
        try:
            await self._wait(job.deadline - came)
        finally:
            job.queue_seconds = time.monotonic() - came
        loop, pieces = asyncio.get_running_loop(), _Pieces()

        def compute() -> None:
            try:
                for piece in job.pieces():
                    pieces.put(piece)
            except Exception as error:
                pieces.put(error)

        def over(_: object) -> None:
            # first the place: a client that has its whole answer may ask again at once
            self._over()
            pieces.end()

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
            with anyio.move_on_after(max(0.0, seconds)) as scope:
                self._waits.add(scope)
                mine = await self._turn.acquire()
        finally:
            self._waits.discard(scope)
            self.waiting -= 1
        if not mine:
            self._check_open()
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
            f"an answer is under way, and {self.waiting} requests wait for it, as many as may:"
            " try again later",
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
        """Begin no more generations, and send away who waits; the one that computes goes on."""
        self._closing = self._closing or why
        for scope in self._waits:
            scope.cancel()

    def cut(self, why: str) -> None:
        """As ``refuse``, and end the one that computes with its next token."""
        self.refuse(why)
        if self.running is not None:
            self.running.cut = self.running.cut or "shutdown"

    def close(self) -> None:
        """Wait until nothing computes any more."""
        self.cut("the server has ended")
        self._thread.shutdown()


class _Pieces:
    """What the thread has computed, on its way to the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready: deque[Any] = deque()
        self._woken = asyncio.Event()
        self._sleeps = False  # whether the next piece has to wake the loop

    def put(self, piece: Any) -> None:
        """Called by the thread."""
        self._ready.append(piece)
        if self._sleeps:
            self._sleeps = False
            self._loop.call_soon_threadsafe(self._woken.set)

    def end(self) -> None:
        """Called by the loop, after the last piece."""
        self._ready.append(_END)
        self._woken.set()

    def _look(self) -> None:
        self._sleeps = True
        if self._ready:  # it came before
            self._woken.set()

    async def take(self, pause: float) -> list[Any]:
        """What there is at the end of a pause, or else comes first after it; the end breaks it."""
        timer = self._loop.call_later(pause, self._look)
        try:
            await self._woken.wait()
        finally:
            timer.cancel()
        self._woken.clear()
        self._sleeps = False
        return [self._ready.popleft() for _ in range(len(self._ready))]


async def _pass_on(pieces: _Pieces, emit: Emit) -> Exception | None:
    """Emit all pieces; the error that ended them."""
    error, n = None, 0
    while True:
        ready = await pieces.take(0 if n < _AT_ONCE else PAUSE)
        if known := [piece for piece in ready if isinstance(piece, dict)]:
            n += len(known)
            await emit(known)
        error = next((piece for piece in ready if isinstance(piece, Exception)), error)
        if _END in ready:
            return error
