"""Calibration figures: ECDF of posterior ranks, and coverage against credibility level.

Public names: `rank_ecdf`, `coverage_curve`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_flows.plots.style import GREY, as_columns, axes_or_new, checked_labels, line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def rank_ecdf(
    ranks: Any,
    *,
    band: tuple[Any, Any, Any] | None = None,
    labels: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the ECDF of posterior ranks minus the uniform distribution, one line per parameter.

    If a line is above zero everywhere, the ranks are too low: the posterior lies too high. If a
    line is first above and then below zero, too many ranks are near 0 and 1: the posterior is too
    narrow.

    Args:
        ranks: Ranks scaled to [0, 1], shape (N, D) or (N,).
        band: Band for the ECDF itself: points, lower edge and upper edge, each of shape (K,), as
            returned by `diagnostics.uniformity.ecdf_band`.
        labels: Names of the D parameters, for the legend.
        ax: Axes to draw on; new axes by default.

    Returns:
        The axes.

    Raises:
        ValueError: A rank is outside [0, 1], or the number of labels is not D.

    References:
        Saeilynoja et al. 2022, Graphical Test for Discrete Uniformity and its Applications,
        arXiv:2103.10522, section 3.
    """
    ranks = as_columns("ranks", ranks)
    labels = checked_labels(labels, ranks.shape[1])
    if np.min(ranks) < 0 or np.max(ranks) > 1:
        raise ValueError("ranks: expected values in [0, 1], got some outside")
    ax = axes_or_new(ax, (4.2, 3.4))
    if band is not None:
        points, lower, upper = (np.asarray(b, float) for b in band)
        edges = [np.r_[0, points, 1], np.r_[0, lower - points, 0], np.r_[0, upper - points, 0]]
        ax.fill_between(*edges, color=GREY, alpha=0.25, lw=0, label="95% band")
    grid = np.linspace(0, 1, 501)
    for i, column in enumerate(ranks.T):
        ecdf = np.searchsorted(np.sort(column), grid, side="right") / len(column)
        ax.plot(grid, ecdf - grid, label=labels[i], lw=1.4, **line_style(i))
    ax.axhline(0.0, color=GREY, lw=0.8, zorder=0)
    top = 1.25 * max(np.abs(ax.get_ylim()))  # space for the legend
    ax.set(xlim=(0, 1), ylim=(-top, top), xlabel="posterior rank", ylabel="ECDF - uniform")
    beside_axes = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    placement = beside_axes if len(labels) > 5 else {"loc": "upper right", "ncols": 2}
    if band is not None or any(labels):
        ax.legend(frameon=False, fontsize="small", **placement)
    return ax


def coverage_curve(
    levels: Any,
    covered: Mapping[str, Any],
    *,
    band: tuple[Any, Any] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the share of true parameters covered against the nominal credibility level.

    Args:
        levels: Credibility levels in (0, 1), shape (K,).
        covered: Share of true parameters covered at each level, shape (K,), one array per name.
        band: Lower and upper edge of a band around the diagonal, shape (K,) each.
        ax: Axes to draw on; new axes by default.

    Returns:
        The axes.

    Raises:
        ValueError: A curve has another shape than the levels.
    """
    levels = np.asarray(levels, float)
    for name, curve in covered.items():
        if np.shape(curve) != levels.shape:
            raise ValueError(f"{name}: expected shape {levels.shape}, got {np.shape(curve)}")
    ax = axes_or_new(ax, (3.6, 3.4))
    if band is not None:
        ax.fill_between(levels, *band, color=GREY, alpha=0.25, lw=0, label="95% band")
    ax.plot([0, 1], [0, 1], color=GREY, lw=0.8, zorder=0)
    for i, (name, curve) in enumerate(covered.items()):
        ax.plot(levels, curve, label=name, lw=1.6, **line_style(i))
    ax.text(0.04, 0.70, "under-confident", color=GREY, fontsize="small")
    ax.text(0.96, 0.30, "over-confident", color=GREY, fontsize="small", ha="right")
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.set(xlabel="credibility level", ylabel="share of truths covered")
    ax.legend(frameon=False, fontsize="small", loc="upper left")
    return ax
