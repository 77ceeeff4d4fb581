"""What CUDA takes of a GPU for itself, made smaller."""

from __future__ import annotations

import ctypes
import sys

# CU_LIMIT_STACK_SIZE
_STACK_SIZE = 0


def spare_stacks() -> None:
    """Keep no stacks for the threads of kernels on the GPUs that this process uses.

    CUDA's context has 1 KiB for each thread that a GPU can run: 264 MiB on an H100. ggml's kernels
    have frames of known size, which CUDA makes room for when a kernel needs it. Only recursion,
    and calls through pointers, need the limit: other libraries in this process may set their own.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return
    n = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(n)) != 0:
        return
    for device in range(n.value):
        flags, active = ctypes.c_uint(), ctypes.c_int()
        driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
        context = ctypes.c_void_p()
        if not active.value or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) != 0:
            continue
        if driver.cuCtxPushCurrent_v2(context) == 0:
            driver.cuCtxSetLimit(_STACK_SIZE, ctypes.c_size_t(0))
            driver.cuCtxPopCurrent_v2(ctypes.byref(context))
        driver.cuDevicePrimaryCtxRelease_v2(device)
