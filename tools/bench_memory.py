#!/usr/bin/env python3
"""Compares stock llama.cpp with EdgeLLM where memory is short, in a control group.

Makes a model with random weights, limits a process to a share of its size, drops the page cache,
and runs three engines in turn: stock llama.cpp as it comes ("stock": dense, mapped file), the same
without its copy of the weights in a faster layout ("stock-mapped", which needs only the page
cache), and EdgeLLM with memory= ("edge"). Stock is the unpatched libllama in the folder --stock, or
the bundled one without a hook. --timeout ends a run; its tokens so far count. Needs Linux with
memory control groups, and root. Example:

    python tools/bench_memory.py --shape 1b --type q4_0 --plot memory.svg
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "tools"), str(REPOSITORY)]

from control_group import ControlGroup, NoControlGroups, control_group  # noqa: E402

MIB = 1 << 20
# Left of the limit for what is not private memory: page tables, and the pages of libraries.
OVERHEAD = 0.02


# --- in the group --------------------------------------------------------------------------------


class Meter:
    """Writes what has been measured so far to a file, so that it outlives the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = time.perf_counter()
        self.figures: dict[str, Any] = {"tokens": 0}

    def mark(self, name: str) -> None:
        self.figures[name] = time.perf_counter() - self._start

    def write(self) -> None:
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.figures["major_faults"] = usage.ru_majflt
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        self.figures["read_bytes"] = int(fields["read_bytes"])
        self.mark("total_seconds")
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self.figures))
        new.rename(self._path)


def run_engine(engine: str, path: Path, options: dict[str, Any], result: Path) -> None:
    """Load, pre-fill, decode; the body of the measured process."""
    meter = Meter(result)
    common = {
        "n_ctx": options["prompt"] + options["decode"] + 16,
        "n_threads": options["threads"],
        "n_threads_batch": options["threads"],
        "verbose": False,
    }
    prompt = [(7919 * i + 13) % 30000 + 260 for i in range(options["prompt"])]
    if engine.startswith("stock"):
        if options["stock"]:
            os.environ["LLAMA_CPP_LIB_PATH"] = options["stock"]
            sys.path.insert(0, str(REPOSITORY / "coreinfer_edge" / "_bundled"))
            import llama_cpp
        else:
            from coreinfer_edge.binding.load import llama_cpp

        llama: Any = llama_cpp.Llama(str(path), use_extra_bufts=engine == "stock", **common)
        steps = llama.generate(prompt, temp=0.0)
        run = None
    else:
        from coreinfer_edge import EdgeLLM

        density = options["density"]
        memory = options["memory"]
        # without the copy of weights that a limit leaves no room for, in either case
        llm = EdgeLLM(path, density=density, memory=memory, repack=False, warmup=0, **common)
        if llm.plan is not None:
            meter.figures["plan"] = llm.plan.as_dict()
        steps = llm.llama.generate(prompt, temp=0.0)
        run = llm.llama
    meter.mark("load_seconds")
    meter.write()
    for n, _ in enumerate(steps, 1):
        meter.figures["tokens"] = n
        if n == 1:
            meter.mark("first_token_seconds")
        if n == 2:  # the first with the core set, which it has chosen and gathered
            meter.mark("second_token_seconds")
        if run is not None:
            meter.figures["density"] = run.run.density
            meter.figures["streamed_bytes"] = run.run.streamed_bytes
            meter.figures["stream_seconds"] = run.run.stream_seconds
            meter.figures["decode_major_faults"] = run.run.core_faults
            meter.figures["peak_private_bytes"] = run.run.peak_private
        meter.write()
        if n == options["decode"]:
            break
    steps.close()
    if run is not None:
        meter.figures["peak_private_bytes"] = run.run.peak_private
    meter.write()


# --- around it -----------------------------------------------------------------------------------


def disk_rate(path: Path) -> float | None:
    """Bytes per second of plain sequential reads past the page cache."""
    start = time.perf_counter()
    command = ["dd", f"if={path}", "of=/dev/null", "bs=4M", "iflag=direct"]
    done = subprocess.run(command, stderr=subprocess.DEVNULL, check=False)
    return path.stat().st_size / (time.perf_counter() - start) if done.returncode == 0 else None


def drop_page_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def measure(
    group: ControlGroup, engine: str, path: Path, options: dict[str, Any], timeout: float
) -> dict[str, Any]:
    """One run of one engine; what it had got to when it ended or was ended."""
    drop_page_cache()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--engine", engine, str(path)]
        command += [json.dumps(options), str(result)]
        start = time.perf_counter()
        try:
            done = group.run(command, timeout=timeout, stderr=subprocess.PIPE, check=False)
            lines = done.stderr.strip().splitlines()
            error = "" if done.returncode == 0 else (lines or ["failed"])[-1]
            if done.returncode == -9:
                error = "killed: out of memory"
        except subprocess.TimeoutExpired:
            error = f"not finished after {timeout:g} s"
        seconds = time.perf_counter() - start
        figures = json.loads(result.read_text()) if result.exists() else {"tokens": 0}
    figures.update(engine=engine, wall_seconds=seconds, group_peak_bytes=group.peak())
    if error:
        figures["error"] = error
    # of the tokens after the second; of a run that was ended, up to its end
    n = figures["tokens"] - 2
    if n > 0:
        end = seconds if error else figures["total_seconds"]
        figures["decode_tokens_per_second"] = n / (end - figures["second_token_seconds"])
    elif figures["tokens"]:
        figures["decode_tokens_per_second"] = 1 / max(
            1e-9, seconds - figures["first_token_seconds"]
        )
    else:
        figures["decode_tokens_per_second"] = 0.0
    return figures


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| limit | engine | first token | decode tok/s | whole answer | peak | read | faults |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        name = r["engine"] + (f", density {r['density']:.2f}" if "density" in r else "")
        first = f"{r['first_token_seconds']:.1f} s" if "first_token_seconds" in r else "-"
        whole = f"{r['wall_seconds']:.1f} s"
        if "error" in r:
            whole = f"{r['tokens']} tokens: {r['error'].partition(' (Python')[0]}"
        share = "none" if r["share"] is None else f"{r['share']:.0%}"
        lines.append(
            f"| {share} | {name} | {first} | {r['decode_tokens_per_second']:.2f} | {whole} |"
            f" {(r['group_peak_bytes'] or 0) / MIB:.0f} MiB |"
            f" {r.get('read_bytes', 0) / MIB:.0f} MiB"
            f" | {r.get('major_faults', 0)} |"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path, title: str) -> None:
    """Tokens per second over memory, with the density beside it; no point where nothing ran."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    limited = [r for r in results if r["share"]]
    for engine, label in (("stock", "stock llama.cpp"), ("edge", "CoreInfer Edge, memory=")):
        best: dict[float, float] = {}
        for r in limited:
            if r["engine"].startswith(engine) and r["tokens"]:
                rate = r["decode_tokens_per_second"]
                best[100 * r["share"]] = max(rate, best.get(100 * r["share"], 0.0))
        axes.plot(list(best), list(best.values()), marker="o", label=label)
    for r in limited:
        if "density" in r:
            at = (100 * r["share"], r["decode_tokens_per_second"])
            text = f"density {r['density']:.2f}"
            axes.annotate(text, at, xytext=(4, 6), textcoords="offset points", fontsize=8)
    axes.set(xlabel="memory limit, % of the model file", ylabel="decoding, tok/s", title=title)
    axes.margins(0.12)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    if sys.argv[1:2] == ["--engine"]:
        _, _, engine, path, options, result = sys.argv
        run_engine(engine, Path(path), json.loads(options), Path(result))
        return
    from make_random_gguf import SHAPES, make_random_gguf

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="1b", choices=sorted(SHAPES))
    parser.add_argument("--type", default="q4_0")
    parser.add_argument("--share", nargs="+", type=float, default=[0.4, 0.6, 0.8, 1.0, 1.2])
    parser.add_argument("--density", type=float, default=None, help="default: what fits")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for each run")
    parser.add_argument("--stock", default="", help="folder of an unpatched libllama")
    parser.add_argument("--engines", nargs="+", default=["stock", "stock-mapped", "edge"])
    parser.add_argument(
        "--unlimited",
        action="store_true",
        help="EdgeLLM without a limit as well (and without repack, as with one)",
    )
    parser.add_argument("--cache", type=Path, default=None, help="folder to keep the model in")
    parser.add_argument("--json", type=Path, default=None, help="write all figures to this file")
    parser.add_argument("--plot", type=Path, default=None)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{args.shape}-{args.type}.gguf"
        if not path.exists():
            make_random_gguf(path, "llama", type=args.type, shape=args.shape)
        size = path.stat().st_size
        rate = disk_rate(path)
        print(
            f"{path.name}: {size / MIB:.0f} MiB; the disk reads"
            f" {(rate or 0) / MIB:.0f} MiB/s in sequence",
            file=sys.stderr,
        )
        results = []
        for share in args.share:
            limit = int(share * size)
            edge_density = args.density
            for engine in args.engines:
                options: dict[str, Any] = {
                    "prompt": args.prompt,
                    "decode": args.decode,
                    "threads": args.threads,
                    "density": edge_density,
                    "memory": int(limit * (1 - OVERHEAD)),
                    "stock": args.stock,
                }
                try:
                    with control_group() as group:
                        group.limit(limit)
                        result = measure(group, engine, path, options, args.timeout)
                except NoControlGroups as error:
                    sys.exit(
                        f"bench_memory needs Linux with memory control groups, and root: {error}"
                    )
                results.append({"share": share, "limit_bytes": limit, **result})
                print(table(results[-1:]).splitlines()[-1], file=sys.stderr)
            if args.unlimited and "density" in results[-1]:
                options.update(memory=None, density=min(1.0, results[-1]["density"]))
                with control_group() as group:
                    result = measure(group, "edge", path, options, args.timeout)
                results.append({"share": None, "limit_bytes": None, **result})
                print(table(results[-1:]).splitlines()[-1], file=sys.stderr)
    report = {
        "model": f"{args.shape} {args.type}",
        "model_bytes": size,
        "disk_bytes_per_second": rate,
        "prompt": args.prompt,
        "decode": args.decode,
        "threads": args.threads,
        "results": results,
    }
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot, f"Llama {args.shape.upper()} {args.type.upper()}")


if __name__ == "__main__":
    main()
