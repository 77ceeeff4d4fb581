#!/usr/bin/env python3
"""Answers one question three times with the packaged SmolLM2, and shows the gain and the loss.

The three are llama.cpp, the defaults of this package (the whole model, faster kernels), and a core
set. The loss of the core set is measured on answers to other questions.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from coreinfer_edge import EdgeLLM, Figures
from coreinfer_edge.choose.statistics import level_names
from coreinfer_edge.measure.quality import CHAT_PROMPTS, Evaluation, Quality, Setting, chat_samples
from coreinfer_edge.model.header import read_header
from coreinfer_edge.model.source import resolve
from coreinfer_edge.run.processors import default_threads

PROMPT = "Explain in simple terms why the sky is blue during the day and red at sunset."
TOKENS = 160

CORE_DENSITY = 0.7

# How each column is made: the arguments of EdgeLLM.
COLUMNS: dict[str, dict[str, float]] = {
    "llama.cpp": {"density": 1.0},
    "default": {},
    f"density={CORE_DENSITY}": {"density": CORE_DENSITY},
}


def answer(arguments: dict[str, float]) -> tuple[str, Figures]:
    n_threads = default_threads()[1]  # all that this process may use
    with EdgeLLM("demo", n_ctx=1024, n_threads=n_threads, **arguments) as llm:
        # the first pass through a model also reads it from the disk
        llm.generate("Hello", max_tokens=4, temperature=0)
        text = llm.chat(
            [{"role": "user", "content": PROMPT}],
            max_tokens=TOKENS,
            temperature=0,
            repeat_penalty=1.1,
        )
        assert llm.last is not None
        return text, llm.last


def price() -> Quality:
    """How far the core set is from the whole model, on the whole model's own answers."""
    path = resolve("demo")
    with EdgeLLM(path, strategy="dense", n_ctx=1024) as llm:
        samples = chat_samples(llm, "auto", 64, CHAT_PROMPTS[:6])
        with Evaluation(
            llm, read_header(path), [Setting("energy", CORE_DENSITY)], samples
        ) as evaluation:
            return evaluation.measure().qualities[0]


def main() -> None:
    console = Console()
    columns: dict[str, Figures] = {}
    for name, arguments in COLUMNS.items():
        text, columns[name] = answer(arguments)
        console.rule(name)
        console.print(text.strip(), markup=False, highlight=False)

    table = Table(title="SmolLM2-135M-Instruct Q4_1, greedy, this machine")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")

    def row(label: str, *values: str) -> None:
        table.add_row(label, *values)

    figures = list(columns.values())
    first = figures[0].decode_tokens_per_second
    row("decode", *(f"{f.decode_tokens_per_second:.0f} tok/s" for f in figures))
    row("against llama.cpp", *(f"{f.decode_tokens_per_second / first:.2f}x" for f in figures))
    row("pre-fill", *(f"{f.prefill_seconds:.2f} s" for f in figures))
    row("choose and gather", *(f"{f.choose_seconds:.2f} s" for f in figures))
    row("density at the end", *(f"{f.density:.2f}" for f in figures))
    row("FFN weights read per token", *(f"{f.core_ffn_bytes / 2**20:.0f} MiB" for f in figures))
    row("weights for our kernels", *(f"{f.packed_bytes / 2**20:.0f} MiB" for f in figures))
    console.print()
    console.print(table)

    cost = price()
    console.print(
        "The default has llama.cpp's weights, all of them: it differs in rounding only."
        + (
            ""
            if figures[1].packed_bytes
            else " On this machine it is no faster: there are no kernels of ours for it."
        )
    )
    console.print(
        f"density={CORE_DENSITY} (levels {level_names(cost.levels)}) changes the text: on"
        f" {cost.n_samples}"
        f" other answers {cost.agreement.mean:.0%} of the next tokens stay the whole model's first"
        f" choice, and the KL divergence is {cost.kl.mean:.2f} nats per token. A lower density"
        " reads less, and costs more: coreinfer-edge eval demo --density 0.3,0.5,0.9 measures it."
    )


if __name__ == "__main__":
    main()
