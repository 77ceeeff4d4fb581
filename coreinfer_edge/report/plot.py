"""The file of a plot: checked before the measurement, saved after it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from coreinfer_edge.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_TYPES = (".png", ".svg", ".pdf")


def check_plot(path: Path | None) -> None:
    """Check before the measurement that a plot, if one is wanted, can be saved.

    Raises:
        ArgumentError: the name has no picture's ending, the folder does not exist, or matplotlib is
            not installed.
    """
    if path is None:
        return
    if path.suffix.lower() not in PLOT_TYPES:
        raise ArgumentError(f"{path}: a plot's name must end in one of {', '.join(PLOT_TYPES)}")
    if not path.parent.is_dir():
        raise ArgumentError(f"{path.parent} is not a folder: make it, or name another file")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ArgumentError(
            "--plot needs the package matplotlib: pip install 'coreinfer-edge[eval]'"
        ) from error


def save_plot(figure: Figure, path: Path) -> None:
    """Write a plot to a file.

    Raises:
        ArgumentError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ArgumentError(f"{path} cannot be written: {error.strerror or error}") from error
