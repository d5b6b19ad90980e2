"""Colours, line styles, new axes and input checks shared by all figures.

Internal names: `COLOURS`, `STYLES`, `GREY`, `axes_or_new`, `line_style`, `as_columns`,
`checked_labels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Line colours for colour-blind readers, from Okabe & Ito 2008, Color Universal Design."""

STYLES = ("-", "--", ":", "-.")
GREY = "#888888"


def axes_or_new(ax: Axes | None, size_inches: tuple[float, float]) -> Axes:
    """Return `ax`, or the axes of a new figure of this size if `ax` is None."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size_inches, layout="constrained")[1] if ax is None else ax


def line_style(i: int) -> dict[str, Any]:
    """Return colour and line style of line number i. There are 24 different combinations."""
    return {"color": COLOURS[i % len(COLOURS)], "ls": STYLES[i // len(COLOURS) % len(STYLES)]}


def as_columns(name: str, values: Any, *, finite: bool = True) -> np.ndarray:
    """Convert values of shape (n, D), or (n,) for one column, to a float array (n, D).

    Raises:
        ValueError: The array is empty, has another number of axes, or holds NaN or infinity
            although `finite` is set.
    """
    columns = np.asarray(values, float)
    columns = columns[:, None] if columns.ndim == 1 else columns
    if columns.ndim != 2 or 0 in columns.shape:
        raise ValueError(f"{name}: expected shape (n, D) or (n,), got {columns.shape}")
    if finite and not np.all(np.isfinite(columns)):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    return columns


def checked_labels(labels: Sequence[str] | None, count: int) -> list[str]:
    """Return the labels as a list; empty strings if there are none.

    Raises:
        ValueError: The number of labels is not `count`.
    """
    if labels is not None and len(labels) != count:
        raise ValueError(f"labels: expected {count} names, got {len(labels)}")
    return [""] * count if labels is None else list(labels)
