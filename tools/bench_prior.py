"""Measures the time to read the coreinfer.* metadata, by default at the sizes of a 7B model.

Prints the size of the metadata, the time to read and check it as EdgeLLM does, and the time that it
adds to llama.cpp's reading of the header. The file is in the page cache, like a file whose header
was just read.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.calibrate.convert import write_with_prior
from coreinfer_edge.choose.prior import Clusters, Prior, fingerprint, from_header
from coreinfer_edge.model.header import read_header


def some_prior(n_layers: int, n_ff: int, n_clusters: int) -> Prior:
    rng = np.random.default_rng(0)

    def arrays() -> list[np.ndarray]:
        return [rng.random(n_ff, dtype=np.float32) for _ in range(n_layers)]

    counts = [rng.integers(0, 256, (n_clusters, n_ff), dtype=np.uint8) for _ in range(n_layers)]
    return Prior(
        list(range(n_layers)),
        32768,
        *(arrays() for _ in range(4)),
        clusters=Clusters(counts, 0.4),
        gradient=arrays(),
    )


def model_of_shape(path: Path, n_layers: int, n_ff: int) -> None:
    """A GGUF with as many layers and neurons, each neuron with one weight."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(n_layers)
    column = np.ones((1, n_ff), dtype=np.float32)
    for i in range(n_layers):
        writer.add_tensor(f"blk.{i}.ffn_up.weight", column.T.copy())
        writer.add_tensor(f"blk.{i}.ffn_gate.weight", column.T.copy())
        writer.add_tensor(f"blk.{i}.ffn_down.weight", column)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def best_of(n: int, call: Callable[[], object]) -> float:
    """The least of n times, in milliseconds."""
    times = []
    for _ in range(n):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def llama_reads_header(path: Path) -> None:
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if model:  # without a vocabulary it ends with an error, after the header
        llama_cpp.llama_model_free(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--neurons", type=int, default=11008, help="per layer")
    parser.add_argument("--clusters", type=int, default=8)
    args = parser.parse_args()
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(lambda *_: None), None)
    with tempfile.TemporaryDirectory() as folder:
        plain, path = Path(folder) / "plain.gguf", Path(folder) / "prior.gguf"
        model_of_shape(plain, args.layers, args.neurons)
        prior = some_prior(args.layers, args.neurons, args.clusters)
        write_with_prior(read_header(plain), prior, path)
        header = read_header(path)
        size = path.stat().st_size - plain.stat().st_size
        print(f"{args.layers} layers of {args.neurons} neurons: {size / 1e6:.1f} MB of metadata")
        reads = best_of(20, lambda: from_header(header))
        of_which = best_of(20, lambda: fingerprint(header))
        print(f"reading and checking it: {reads:.1f} ms, {of_which:.1f} of them the fingerprint")
        for what, read in (("our own look", read_header), ("llama.cpp's look", llama_reads_header)):
            without, with_it = (best_of(20, lambda p=p, r=read: r(p)) for p in (plain, path))
            print(f"{what} at the header: {with_it:.1f} ms, {without:.1f} without")


if __name__ == "__main__":
    sys.exit(main())
