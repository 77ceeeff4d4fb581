#!/usr/bin/env python3
"""Generates from the packaged SmolLM2 twice, dense and with core neurons, and compares the two."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from coreinfer_edge import EdgeLLM, Figures
from coreinfer_edge.model_source import resolve

PROMPT = "Explain in simple terms why the sky is blue during the day and red at sunset."


def generate(density: float) -> tuple[str, Figures]:
    with EdgeLLM(resolve("demo"), density=density) as llm:
        # the first pass through a model also reads it from the disk
        llm.generate("Hello", max_tokens=4, temperature=0)
        text = llm.chat(
            [{"role": "user", "content": PROMPT}],
            max_tokens=160,
            temperature=0,
            repeat_penalty=1.1,
        )
        assert llm.last is not None
        return text, llm.last


def main() -> None:
    console = Console()
    table = Table(title="SmolLM2-135M-Instruct Q4_1, greedy, this machine")
    table.add_column("")
    columns = []
    for name, density in (("dense", 1.0), ("core", 0.5)):
        text, figures = generate(density)
        console.rule(f"{name}, density {figures.density:.2f}")
        console.print(text.strip(), markup=False, highlight=False)
        table.add_column(name, justify="right")
        columns.append(figures)

    def row(label: str, *values: str) -> None:
        table.add_row(label, *values)

    row("density", *(f"{f.density:.2f}" for f in columns))
    row("prompt tokens", *(str(f.prompt_tokens) for f in columns))
    row("generated tokens", *(str(f.completion_tokens) for f in columns))
    row("of them warm-up, dense", *(str(f.warmup_tokens) for f in columns))
    row("pre-fill", *(f"{f.prefill_seconds:.2f} s" for f in columns))
    row("choose and gather", *(f"{f.choose_seconds:.2f} s" for f in columns))
    row("decode", *(f"{f.decode_tokens_per_second:.1f} tok/s" for f in columns))
    row(
        "of it with the core set",
        *(
            f"{f.core_tokens_per_second:.1f} tok/s" if f.core_tokens_per_second else ""
            for f in columns
        ),
    )
    row("FFN weights read per token", *(f"{f.core_ffn_bytes / 2**20:.1f} MiB" for f in columns))
    row("peak memory of the process", *(f"{f.peak_memory_bytes / 2**20:.0f} MiB" for f in columns))
    console.print()
    console.print(table)


if __name__ == "__main__":
    main()
