"""Panels of a corner plot: marginals, contours, axes, quantiles and titles.

Public names: `Estimates`, `Layout`, `estimate`, `axis_ranges`, `draw_marginal`, `draw_pair`,
`draw_quantiles`, `format_panel`, `summary_text`, `set_title`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sbi_flows.plots.marginals import (
    bandwidth,
    contour_points,
    grid_ends,
    region_heights,
    smooth_curve,
    smooth_surface,
)
from sbi_flows.plots.style import COLOURS, line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_COPIES = 50
"""Mean number of copies of a draw, as in Markov chains, above which values count as discrete."""

MIN_FONT_SIZE = 4.0
"""Smallest font size of a title, in points."""


class Estimates(NamedTuple):
    """One set of draws, with the grids and kernels of its marginals.

    Attributes:
        draws: Draws, shape (n, D).
        ends: Ends of each parameter's grid; None if the draws lie beyond its axis.
        kernel_stds: Kernel width of each parameter, in its units.
        num_draws: Number of different draws.
    """

    draws: np.ndarray
    ends: list[tuple[float, float] | None]
    kernel_stds: list[float]
    num_draws: int


class Layout(NamedTuple):
    """Axes of a corner plot.

    Attributes:
        labels: Names of the D parameters.
        ranges: Lower and upper end of each axis, shape (D, 2).
    """

    labels: list[str]
    ranges: np.ndarray

    @property
    def font_size(self) -> str:
        """Size of labels and ticks."""
        return "small" if len(self.labels) < 6 else "x-small"


def estimate(draws: np.ndarray, ranges: np.ndarray) -> Estimates:
    """Choose grids and kernels for draws (n, D) on axes with the given ranges (D, 2)."""
    num_draws = max(len(np.unique(column)) for column in draws.T)
    if len(draws) > MAX_COPIES * num_draws:
        num_draws = len(draws)  # discrete values, which repeat without being copies
    ends = [grid_ends(column, axis) for column, axis in zip(draws.T, ranges, strict=True)]
    stds = [
        0.0 if end is None else bandwidth(column, end, num_draws)
        for column, end in zip(draws.T, ends, strict=True)
    ]
    return Estimates(draws, ends, stds, num_draws)


def axis_ranges(sets: Mapping[str, np.ndarray], truth: np.ndarray | None) -> np.ndarray:
    """Return axis ranges (D, 2) that hold the central 99.6% of all draws, and the truth."""
    central = [np.quantile(draws, [0.002, 0.998], axis=0) for draws in sets.values()]
    marks = np.concatenate(central if truth is None else [*central, truth[None]])
    low, high = marks.min(axis=0), marks.max(axis=0)
    pad = np.where(high > low, 0.06 * (high - low), np.maximum(0.5, 1e-3 * np.abs(low)))
    padded = np.stack([low - pad, high + pad], axis=1)
    # Padding stops at the outermost draw: at an edge of the prior's support the density jumps.
    values = np.concatenate([*sets.values(), marks])
    clipped = np.clip(padded, values.min(axis=0)[:, None], values.max(axis=0)[:, None])
    return np.where((high > low)[:, None], clipped, padded)


def draw_marginal(ax: Axes, each: Estimates, col: int, i: int, name: str) -> None:
    """Draw one parameter's density, scaled to a peak of 1, in the style of line i."""
    ends, style = each.ends[col], line_style(i)
    if ends is None:
        ax.plot([], [], lw=1.4, label=name, **style)  # for the legend
        return
    x, density = smooth_curve(each.draws[:, col], ends, each.kernel_stds[col])
    height = density / density.max()
    # the curve ends at the axis where the draws end
    outline = np.r_[x[0], x, x[-1]], np.r_[0.0, height, 0.0]
    ax.plot(*outline, lw=1.4, label=name, **style)
    if i == 0:
        ax.fill_between(*outline, color=COLOURS[0], alpha=0.2, lw=0)


def draw_pair(
    ax: Axes, each: Estimates, pair: tuple[int, int], i: int, levels: Sequence[float]
) -> None:
    """Draw contours of highest density for two parameters, in the style of line i."""
    ends = [each.ends[j] for j in pair]
    known = [end for end in ends if end is not None]
    if len(known) < 2:
        return
    stds = [each.kernel_stds[j] for j in pair]
    surface = smooth_surface(each.draws[:, list(pair)], known, stds, each.num_draws)
    heights = region_heights(surface, levels)
    if not heights.size:
        return  # the regions lie beyond the limits
    points, style = contour_points(surface), line_style(i)
    if i == 0:
        ax.contourf(*points, [*heights, np.inf], colors=style["color"], alpha=0.2)
        ax.contourf(*points, [heights[-1], np.inf], colors=style["color"], alpha=0.3)
    ax.contour(*points, heights, colors=style["color"], linestyles=style["ls"])


def draw_quantiles(ax: Axes, draws: np.ndarray, quantiles: Sequence[float]) -> None:
    """Draw dashed vertical lines at quantiles of the first set's draws (n,)."""
    for value in np.quantile(draws, quantiles):
        ax.axvline(float(value), color=COLOURS[0], lw=0.9, ls="--")


def format_panel(ax: Axes, row: int, col: int, layout: Layout) -> None:
    """Set limits, ticks and labels of one panel."""
    from matplotlib.ticker import MaxNLocator

    last, size = len(layout.labels) - 1, layout.font_size
    ax.set_xlim(*layout.ranges[col])
    ax.xaxis.set_major_locator(MaxNLocator(3, prune="both"))
    ax.tick_params(labelsize=size, length=2)
    ax.tick_params(axis="x", labelrotation=45, labelbottom=row == last)
    if row == last:
        ax.set_xlabel(layout.labels[col], fontsize=size)
    if row == col:
        ax.set(yticks=[], ylim=(0, None))
        ax.spines[["left", "right", "top"]].set_visible(False)
        return
    ax.set_ylim(*layout.ranges[row])
    ax.yaxis.set_major_locator(MaxNLocator(3, prune="both"))
    ax.tick_params(axis="y", labelleft=col == 0)
    if col == 0:
        ax.set_ylabel(layout.labels[row], fontsize=size)


def summary_text(draws: np.ndarray) -> str:
    """Return the median of draws (n,) and the distances to the 84% and 16% quantiles.

    The larger distance has two significant digits, the smaller one at least one.

    Example:
        >>> summary_text(np.array([1.0, 1.1, 1.2345, 1.3, 1.4]))
        '1.23 +0.10 -0.17'
    """
    low, median, high = np.quantile(draws, [0.16, 0.5, 0.84])
    distances = [float(high - median), float(median - low)]
    sizes = [math.floor(math.log10(d)) for d in distances if d > 0]
    if not sizes:
        return f"{median:.4g}"
    decimals = max(1 - max(sizes), -min(sizes))
    largest = max(abs(median), *distances)
    exponent = math.floor(math.log10(largest))
    if -4 < exponent and decimals >= -3:
        values = [round(v, decimals) + 0.0 for v in (float(median), *distances)]
        return "{0:.{3}f} +{1:.{3}f} -{2:.{3}f}".format(*values, max(decimals, 0))
    unit, places = 10.0**exponent, max(decimals + exponent, 0)
    values = [v / unit for v in (float(median), *distances)]
    return "({0:.{3}f} +{1:.{3}f} -{2:.{3}f})e{4:+d}".format(*values, places, exponent)


def set_title(ax: Axes, label: str, draws: np.ndarray) -> None:
    """Write label, median and distances above a panel, in a size that fits into its width."""
    values = summary_text(draws)
    title = ax.set_title(f"{label} = {values}" if label else values, fontsize=9.0, pad=4)
    width = ax.get_window_extent().width
    if label and title.get_window_extent().width > width:
        title.set_text(f"{label} =\n{values}")
    ratio = width / title.get_window_extent().width
    title.set_fontsize(max(MIN_FONT_SIZE, 9.0 * min(1.0, 0.98 * ratio)))
