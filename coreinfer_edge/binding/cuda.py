"""What CUDA takes of a GPU for itself, made smaller."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

# CU_LIMIT_STACK_SIZE
_STACK_SIZE = 0

_NAME = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def _in_use(driver: Any) -> set[int]:
    """The GPUs whose primary context this process has."""
    n, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(n)) != 0:
        return set()
    used = set()
    for device in range(n.value):
        state = driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
        if state == 0 and active.value:
            used.add(device)
    return used


def used_by_others() -> set[int]:
    """The GPUs that another library of this process uses; call it before llama.cpp is loaded."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return set()
    try:
        return _in_use(ctypes.CDLL(_NAME, mode=os.RTLD_NOLOAD))
    except (OSError, AttributeError):  # nobody has loaded it
        return set()


def spare_stacks(others: set[int]) -> bool:
    """Keep no stacks for the threads of kernels on the GPUs that llama.cpp uses.

    CUDA's context has 1 KiB for each thread that a GPU can run: 264 MiB on an H100. ggml's kernels
    have frames of known size, which CUDA makes room for when a kernel needs it. Only recursion,
    and calls through pointers, need the limit.

    Args:
        others: GPUs that another library uses, whose limit stays as it is.

    Returns:
        Whether none of the GPUs in use keeps stacks.
    """
    try:
        driver = ctypes.CDLL(_NAME)
        used = _in_use(driver)
        if used & others:
            return False
        return all(_spared(driver, device) for device in sorted(used))
    except (OSError, AttributeError):  # no driver, or one before CUDA 11
        return False


def _spared(driver: Any, device: int) -> bool:
    context = ctypes.c_void_p()
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) != 0:
        return False
    done = False
    if driver.cuCtxPushCurrent_v2(context) == 0:
        done = driver.cuCtxSetLimit(_STACK_SIZE, ctypes.c_size_t(0)) == 0
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))
    driver.cuDevicePrimaryCtxRelease_v2(device)
    return done
