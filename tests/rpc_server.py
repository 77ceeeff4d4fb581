"""Serves the processor as a device of ggml's RPC backend: a GPU for machines that have none.

python rpc_server.py 127.0.0.1:50052
"""

from __future__ import annotations

import ctypes
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

CPU = 0  # ggml_backend_dev_type


@contextmanager
def rpc_server() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server on a free port: its address, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    log = subprocess.DEVNULL
    with subprocess.Popen([sys.executable, __file__, address], stdout=log, stderr=log) as server:
        try:
            _wait_for(address, server)
            yield address, server
        finally:
            server.kill()


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("the RPC server did not start")


def main() -> None:
    from coreinfer_edge.binding.load import load_library

    load_library("ggml-base")
    ggml, rpc = load_library("ggml"), load_library("ggml-rpc")
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    device = ctypes.c_void_p(ggml.ggml_backend_dev_by_type(CPU))
    serve = rpc.ggml_backend_rpc_start_server
    serve.argtypes = [ctypes.c_char_p] * 2 + [ctypes.c_size_t] * 2 + [ctypes.c_void_p]
    serve(sys.argv[1].encode(), None, 1, 1, ctypes.byref(device))


if __name__ == "__main__":
    main()
