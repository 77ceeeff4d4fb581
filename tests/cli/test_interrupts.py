"""Ctrl-C and SIGTERM where Python would drop them."""

from __future__ import annotations

import ctypes
import signal
import sys
import time

import pytest

from coreinfer_edge.cli.interrupts import (
    TERMINATED,
    ends_when_terminated,
    raise_dropped_interrupts,
)

callback_type = ctypes.CFUNCTYPE(None)


@pytest.fixture(autouse=True)
def hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    raise_dropped_interrupts()


class InterruptedAtItsEnd:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def in_a_callback(number: int) -> None:
    callback_type(lambda: signal.raise_signal(number))()


def in_a_destructor() -> None:
    instance = InterruptedAtItsEnd()
    del instance


def test_an_interrupt_in_a_callback_is_raised_after_it() -> None:
    in_a_callback(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        time.sleep(20)


def test_an_interrupt_in_a_destructor_is_raised_after_it() -> None:
    in_a_destructor()
    with pytest.raises(KeyboardInterrupt):
        time.sleep(20)


def test_a_termination_in_a_callback_is_raised_after_it() -> None:
    with ends_when_terminated():
        in_a_callback(signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            time.sleep(20)
    assert ended.value.code == TERMINATED


def test_another_error_in_a_callback_is_told_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(dropped.exc_type))
    raise_dropped_interrupts()
    callback_type(lambda: 1 / 0)()
    assert told == [ZeroDivisionError]
