"""What CUDA takes of a GPU, with a driver that only notes its calls."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from coreinfer_edge.binding import cuda
from coreinfer_edge.model.source import header_of
from coreinfer_edge.run.gpu_budget import CUBLAS_BYTES, CUDA_RUN_BYTES, cuda_run_bytes


class Driver:
    """Two GPUs, of which this process uses the second.

    Args:
        refuses: the limit cannot be set.
    """

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.calls: list[tuple[str, int]] = []
        self.current: list[int] = []

    def cuDeviceGetCount(self, n: Any) -> int:
        n._obj.value = 2
        return 0

    def cuDevicePrimaryCtxGetState(self, device: int, flags: Any, active: Any) -> int:
        active._obj.value = device
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
        context._obj.value = 100 + device
        self.calls.append(("retain", device))
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        self.current.append(context.value)
        return 0

    def cuCtxSetLimit(self, limit: int, size: Any) -> int:
        assert (limit, size.value) == (0, 0)
        self.calls.append(("no stacks", self.current[-1]))
        return int(self.refuses)

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        self.current.pop()
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: int) -> int:
        self.calls.append(("release", device))
        return 0


def test_gpus_in_use_keep_no_stacks_and_others_get_no_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)

    assert cuda.spare_stacks(set())

    assert driver.calls == [("retain", 1), ("no stacks", 101), ("release", 1)]
    assert driver.current == []


def test_stacks_that_are_kept_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(refuses=True))
    assert not cuda.spare_stacks(set())


def test_a_gpu_that_another_library_uses_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode=0: driver)
    others = cuda.used_by_others()
    assert others == {1}
    assert not cuda.spare_stacks(others)
    assert driver.calls == []


def test_without_a_driver_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, mode: int = 0) -> None:
        raise OSError(f"{name}: no such file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not cuda.spare_stacks(set())
    assert cuda.used_by_others() == set()


def test_a_driver_that_lacks_a_function_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Driver, "cuDevicePrimaryCtxRetain", property(), raising=True)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert not cuda.spare_stacks(set())


@pytest.mark.parametrize(
    ("weights", "n_head", "arguments", "more"),
    [
        ("q4_0", 4, {}, 0),
        ("f32", 4, {}, CUBLAS_BYTES),
        ("q4_0", 8, {}, CUBLAS_BYTES),  # heads of 32: no kernel
        ("q4_0", 4, {"flash_attn": False}, CUBLAS_BYTES),
        ("q4_0", 4, {"lora_path": "a"}, CUBLAS_BYTES),
    ],
)
def test_cublas_is_counted_where_matrices_are_not_quantised(
    random_model: Any, weights: str, n_head: int, arguments: dict[str, Any], more: int
) -> None:
    sizes = {"n_layer": 2, "n_embd": 256, "n_ff": 256, "n_head": n_head, "n_head_kv": n_head}
    path: Path = random_model("llama", weights, **sizes)

    assert cuda_run_bytes(header_of(path), arguments) == CUDA_RUN_BYTES + more
