"""One EdgeLLM used from several threads, closed meanwhile, left to a forked child, or copied."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from core_session import continued, edge
from test_edge import only_ascii
from test_reference import some_tokens

from coreinfer_edge.binding.core import CoreContext
from coreinfer_edge.binding.grammar import _said_on_stderr, checked_grammar
from coreinfer_edge.binding.load import llama_cpp, load_library
from coreinfer_edge.binding.log import captured_log
from coreinfer_edge.binding.sequences import Sequences
from coreinfer_edge.errors import ArgumentError, ModelFileError, NativeError, NotCopyableError
from coreinfer_edge.run.llm import EdgeLLM

pytestmark = pytest.mark.slow

RandomModel = Callable[..., Path]


@pytest.fixture(scope="module")
def model(random_model: RandomModel) -> Path:
    return random_model("llama", n_layer=4)


@pytest.fixture
def fast_switching() -> Iterator[None]:
    """Threads take turns often, so that what can go wrong between two lines does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def pieces(llm: EdgeLLM, n: int = 60) -> Iterator[str]:
    return llm.stream("the hat", max_tokens=n, temperature=0, logit_bias=only_ascii(llm))


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fast_switching")
def test_streams_that_end_while_other_threads_call_leave_every_answer_right(model: Path) -> None:
    with edge(model, warmup=2) as llm:
        expected = llm.generate("the hat", max_tokens=12, temperature=0)
        streamed = llm.generate("a man", max_tokens=4, temperature=0)

        def generate() -> None:
            for _ in range(200):
                assert llm.generate("the hat", max_tokens=12, temperature=0) == expected

        def stream() -> None:
            while not generated.done():
                with contextlib.suppress(ArgumentError):  # ended by a call
                    text = "".join(llm.stream("a man", max_tokens=4, temperature=0))
                    assert text == streamed

        with ThreadPoolExecutor(2) as pool:
            generated = pool.submit(generate)
            pool.submit(stream).result()
            generated.result()


def test_a_call_that_begins_while_a_stream_ends_is_not_disturbed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with edge(model, warmup=4) as llm, ThreadPoolExecutor(1) as pool:
        collect = CoreContext.collect
        calls = []
        begun, ended = threading.Event(), threading.Event()

        def pause(seen: Any, scores: Any) -> Any:
            begun.set()
            ended.wait(60)
            return scores

        def generate() -> str:
            processors = llama_cpp.LogitsProcessorList([pause])
            return llm.generate(some_tokens(20), 30, temperature=0, logits_processor=processors)

        ended.set()
        expected = generate()
        begun.clear()
        ended.clear()
        llm.llama.reset()

        def slow(core: CoreContext, on: bool, *args: Any) -> None:
            if not on and not calls:  # the stream ends
                calls.append(pool.submit(generate))
                begun.wait(0.3)
            collect(core, on, *args)

        monkeypatch.setattr(CoreContext, "collect", slow)
        list(llm.stream("a man", max_tokens=2, temperature=0))
        ended.set()
        assert calls[0].result(timeout=60) == expected


def test_a_call_does_not_wait_for_a_stream_that_nobody_reads(model: Path) -> None:
    with edge(model, warmup=2) as llm:
        stream = pieces(llm)
        next(stream)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(llm.generate, "a man", max_tokens=4).result(timeout=60)
        with pytest.raises(ArgumentError, match="another call has begun"):
            next(stream)


def test_a_stream_that_has_told_its_end_is_cached_before_another_call_begins(model: Path) -> None:
    with edge(model, warmup=2) as llm:
        options: dict[str, Any] = {"temperature": 0, "logit_bias": only_ascii(llm)}
        expected = llm.generate("the hat", max_tokens=2, **options)
        cache = llama_cpp.LlamaRAMCache()
        llm.llama.set_cache(cache)
        chunks = llm.llama.create_completion("the hat", max_tokens=2, stream=True, **options)
        texts = []
        for chunk in chunks:
            texts.append(chunk["choices"][0]["text"])
            if chunk["choices"][0]["finish_reason"]:
                assert len(cache.cache_state) == 1  # before another call changes the state
                llm.generate("a man", max_tokens=4)
        assert "".join(texts) == expected


def test_the_seed_of_a_stream_is_for_that_stream(model: Path) -> None:
    with edge(model, seed=1) as llm, edge(model, seed=1) as other:
        stream = llm.stream("the hat", max_tokens=20, temperature=5.0, seed=2)
        next(stream)
        assert llm.generate("a man", max_tokens=20, temperature=5.0) == other.generate(
            "a man", max_tokens=20, temperature=5.0
        )


def test_a_cached_state_is_not_loaded_while_another_thread_computes(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with edge(model, warmup=2) as llm:
        llm.llama.set_cache(llama_cpp.LlamaRAMCache())
        llm.generate("the hat", max_tokens=4, temperature=0)
        llm.generate("a man", max_tokens=4, temperature=0)
        loaded = []
        load_state = llama_cpp.Llama.load_state

        def spy(llama: Any, state: Any) -> None:
            loaded.append(llama.lock.acquire(blocking=False))
            load_state(llama, state)
            llama.lock.release()

        monkeypatch.setattr(llama_cpp.Llama, "load_state", spy)
        started, go_on = threading.Event(), threading.Event()

        def pause(seen: Any, scores: Any) -> Any:
            started.set()
            go_on.wait(60)
            return scores

        with ThreadPoolExecutor(2) as pool:
            held = pool.submit(
                llm.generate,
                "a man",
                max_tokens=1,
                logits_processor=llama_cpp.LogitsProcessorList([pause]),
            )
            assert started.wait(60)
            stream = pool.submit(lambda: next(llm.stream("the hat", max_tokens=4, temperature=0)))
            done, _ = wait([stream], timeout=0.2)
            assert not done
            assert not loaded
            go_on.set()
            held.result(timeout=60)
            stream.result(timeout=60)
        assert loaded == [True]


def test_the_density_set_during_a_call_holds_from_the_next_on(model: Path) -> None:
    with edge(model, warmup=4) as llm:
        expected = llm.generate("the hat", max_tokens=30, temperature=0)

        def change(seen: Any, scores: Any) -> Any:
            llm.llama.density = 1.0
            return scores

        processors = llama_cpp.LogitsProcessorList([change])
        text = llm.generate("the hat", max_tokens=30, temperature=0, logits_processor=processors)
        assert text == expected


def test_a_call_from_within_a_call_is_refused(model: Path) -> None:
    with edge(model) as llm:
        uses: list[Callable[[], Any]] = [
            lambda: llm.generate("a man", max_tokens=2),
            lambda: llm.close(),
        ]
        for use in uses:

            def within(seen: Any, scores: Any, use: Callable[[], Any] = use) -> Any:
                with pytest.raises(ArgumentError, match="from within another"):
                    use()
                return scores

            processors = llama_cpp.LogitsProcessorList([within])
            llm.generate("the hat", max_tokens=2, logits_processor=processors)


# --- close ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["energy", "dense"])
def test_closing_during_a_call_of_another_thread_ends_the_call_with_an_error(
    strategy: str, model: Path
) -> None:
    for _ in range(5):
        llm = edge(model, strategy=strategy, warmup=2, n_ctx=1024)
        started = threading.Event()
        banned = list(only_ascii(llm))

        def note(
            seen: Any,
            scores: Any,
            started: threading.Event = started,
            banned: list[int] = banned,
        ) -> Any:
            started.set()
            scores[banned] = -100
            return scores

        options: dict[str, Any] = {
            "max_tokens": 900,
            "temperature": 0,
            "logits_processor": llama_cpp.LogitsProcessorList([note]),
        }
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(llm.generate, "the hat", **options)
            assert started.wait(60)
            llm.close()
            with pytest.raises(ArgumentError, match="closed"):
                call.result(timeout=60)


def test_leaving_with_after_a_cancelled_wait_for_a_thread_is_safe(model: Path) -> None:
    async def work() -> None:
        with edge(model, warmup=2, n_ctx=1024) as llm:
            loop, computing = asyncio.get_running_loop(), asyncio.Event()

            def waits_for_close(_: Any, scores: Any) -> Any:
                loop.call_soon_threadsafe(computing.set)
                while llm.llama._gone is None:
                    time.sleep(0.001)
                return scores

            call = asyncio.create_task(
                asyncio.to_thread(
                    llm.generate,
                    "the hat",
                    logits_processor=llama_cpp.LogitsProcessorList([waits_for_close]),
                )
            )
            await computing.wait()
            call.cancel()

    asyncio.run(work())


def test_grammars_checked_in_two_threads_leave_standard_error_where_it_was(
    capfd: pytest.CaptureFixture[str],
) -> None:
    first_is_in, second_tries = threading.Event(), threading.Event()
    inside: list[str] = []

    def first() -> None:
        with _said_on_stderr():
            first_is_in.set()
            second_tries.wait()
            # the second would be in by now, if nothing kept it out
            for _ in range(100):
                time.sleep(0.001)
            inside.append("first leaves")

    def second() -> None:
        first_is_in.wait()
        second_tries.set()
        with _said_on_stderr():
            inside.append("second comes")
            one.join()

    one, other = threading.Thread(target=first), threading.Thread(target=second)
    one.start()
    other.start()
    other.join()
    assert inside == ["first leaves", "second comes"]
    os.write(2, b"still here\n")
    assert "still here" in capfd.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_forked_while_a_grammar_is_checked_has_standard_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    is_in, forks = threading.Event(), threading.Event()

    def check() -> None:
        with _said_on_stderr():
            is_in.set()
            forks.wait()
            time.sleep(0.1)

    thread = threading.Thread(target=check)
    thread.start()
    is_in.wait()
    forks.set()
    child = os.fork()
    if child == 0:
        with _said_on_stderr():
            pass
        os.write(2, b"from the child\n")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()
    assert "from the child" in capfd.readouterr().err


def test_a_program_without_standard_error_checks_grammars_and_prints_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    initialise = llama_cpp.llama_sampler_init_grammar

    def another_thread_writes(*arguments: Any) -> Any:
        os.write(2, b"of another thread\n")
        return initialise(*arguments)

    with edge(model) as llm:
        monkeypatch.setattr(llama_cpp, "llama_sampler_init_grammar", another_thread_writes)
        monkeypatch.setattr(sys, "stderr", None)
        checked_grammar('root ::= "a"', llm.llama)
    assert capfd.readouterr().out == ""


def test_the_binding_sends_standard_streams_nowhere_in_any_of_its_modules(model: Path) -> None:
    with edge(model):
        for module in (llama_cpp._internals, llama_cpp.llama, llama_cpp.llama_chat_format):
            before = os.readlink("/proc/self/fd/1") if sys.platform == "linux" else ""
            with module.suppress_stdout_stderr(disable=False):
                if before:
                    assert os.readlink("/proc/self/fd/1") == before


def test_whatever_is_kept_of_a_closed_model_raises_an_error(model: Path) -> None:
    llm = edge(model, warmup=2)
    llama, core = llm.llama, llm.llama.core
    assert core is not None
    sequences = Sequences(llama, [model], 64, 1, 4)
    llm.generate("the hat", max_tokens=20)
    llm.close()
    uses: list[Callable[[], Any]] = [
        lambda: core.core_bytes,
        core.statistics,
        core.clear_statistics,
        core.down_norms,
        lambda: core.set_core({}),
        lambda: core.use_core(True),
        lambda: core.collect(True),
        lambda: core.begin_stream(1),
        core.end_stream,
        lambda: sequences.evaluate(0, 0, [5]),
        sequences.clear,
        lambda: llama.tokenize(b"the hat"),
        lambda: llama.detokenize([10]),
        lambda: llama.eval([5]),
        llama.reset,
        llama.save_state,
        llama.n_vocab,
        llama.token_bos,
        lambda: llama.ctx,
        lambda: next(llama.generate([5, 6])),
        lambda: llama.create_completion("the hat"),
        lambda: llama.create_embedding("the hat"),
    ]
    for use in uses:
        with pytest.raises(ArgumentError, match="closed"):
            use()
    sequences.close()
    core.close()
    llama.close()


# --- the log --------------------------------------------------------------------------------------


def test_a_line_that_another_thread_logs_is_not_caught_and_nobody_waits() -> None:
    log = load_library("ggml-base").ggml_log_internal
    with ThreadPoolExecutor(1) as pool, captured_log() as lines:
        log(2, b"mine\n")

        def other() -> list[str]:
            log(2, b"not told\n")
            with captured_log() as others:
                log(2, b"theirs\n")
            return list(others)

        assert pool.submit(other).result(timeout=60) == ["theirs\n"]
        log(2, b"mine too\n")
    assert list(lines) == ["mine\n", "mine too\n"]


def test_loads_in_several_threads_give_each_its_own_error(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    data = bytearray(model.read_bytes())
    broken.write_bytes(data[: len(data) // 2])

    def load(path: Path) -> str:
        try:
            with edge(path, warmup=2) as llm:
                return llm.generate("the hat", max_tokens=4, temperature=0)
        except ModelFileError as error:
            return str(error)

    expected = {path: load(path) for path in (model, broken)}
    paths = [model, broken] * 8
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(load, paths)) == [expected[path] for path in paths]


# --- fork, pickle ---------------------------------------------------------------------------------


def in_child(work: Callable[[], None]) -> int:
    """Run it in a forked child; its exit status, a signal's negative, SIGALRM's where it hung."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(60)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_gets_an_error_at_each_use_and_can_load_a_model_of_its_own(
    model: Path,
) -> None:
    with edge(model, warmup=2) as llm, ThreadPoolExecutor(1) as pool:
        expected = llm.generate("the hat", max_tokens=8, temperature=0)
        core = llm.llama.core
        assert core is not None
        sequences = Sequences(llm.llama, [model], 64, 1, 4)
        stream = pieces(llm)
        next(stream)

        def work() -> None:
            uses: list[Callable[[], Any]] = [
                lambda: llm.generate("the hat"),
                lambda: next(stream),
                lambda: next(llm.stream("the hat")),
                lambda: llm.chat([{"role": "user", "content": "hello"}]),
                lambda: llm.llama.tokenize(b"the hat"),
                lambda: core.core_bytes,
                sequences.clear,
            ]
            for use in uses:
                with pytest.raises(ArgumentError, match=r"forked.*spawn"):
                    use()
            llm.close()
            sequences.close()
            core.close()
            with edge(model, warmup=2) as own:
                assert own.generate("the hat", max_tokens=8, temperature=0) == expected

        # while another thread of the parent holds the lock
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with llm.llama.lock:
                held.set()
                release.wait(60)

        holding = pool.submit(hold)
        assert held.wait(60)
        status = in_child(work)
        release.set()
        holding.result()
        assert status == 0
        assert llm.generate("the hat", max_tokens=8, temperature=0) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_loaded_in_a_forked_child_computes_or_is_refused_and_does_not_hang(
    model: Path,
) -> None:
    options = {"n_threads": 2, "n_threads_batch": 2}
    with edge(model, **options) as llm:
        continued(llm, some_tokens(20), 4)

    def work() -> None:
        with contextlib.suppress(NativeError), edge(model, **options) as own:
            continued(own, some_tokens(20), 4)

    assert in_child(work) == 0


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy, copy.copy])
def test_a_loaded_model_is_neither_pickled_nor_copied(
    copied: Callable[[Any], Any], model: Path
) -> None:
    with edge(model) as llm:
        things: list[EdgeLLM | llama_cpp.Llama | CoreContext | None] = [llm, llm.llama]
        for thing in [*things, llm.llama.core]:
            with pytest.raises(NotCopyableError, match="cannot be pickled or copied"):
                copied(thing)
        assert isinstance(NotCopyableError(), TypeError)
        llm.generate("the hat", max_tokens=2)
        assert llm.last is not None
        assert llm.last.completion_tokens > 0
