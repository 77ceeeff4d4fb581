"""How every table looks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str | None]], title: str | None = None
) -> Table:
    """Rows of cells: the first column to the left, the others to the right.

    A column that is empty in every row is left out.
    """
    from rich import box
    from rich.table import Table

    cells = [[cell or "" for cell in row] for row in rows]
    shown = [i for i in range(len(columns)) if not cells or any(row[i] for row in cells)]
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i in shown:
        result.add_column(columns[i], justify="right" if i else "left")
    for row in cells:
        result.add_row(*(row[i] for i in shown))
    return result


def mebibytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"
