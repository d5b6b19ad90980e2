"""Corner plots of posterior draws, and posterior predictions over an observed series.

Public names: `corner`, `predictive`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_flows.plots.style import COLOURS, as_columns, checked_labels, line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARGINAL_BINS, PAIR_BINS = 80, 60
"""Histogram bins along each axis of one- and two-dimensional marginals."""


def corner(
    samples: Any,
    *,
    labels: Sequence[str] | None = None,
    truth: Any | None = None,
    levels: Sequence[float] = (0.5, 0.9),
    limits: Any | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Plot one- and two-dimensional marginals of one posterior, or of several overlaid.

    Args:
        samples: Draws of shape (n, D), or a dict of such arrays by name. The first array is
            drawn filled.
        labels: Names of the D parameters, for example `posterior.prior.labels`.
        truth: True parameters, shape (D,), drawn as lines.
        levels: Probabilities of the highest-density regions that the contours enclose.
        limits: Lower and upper end of each parameter's axis, shape (D, 2); by default the range
            of nearly all draws.
        figure: Figure to draw on; a new figure by default.

    Returns:
        The figure, with D (D + 1) / 2 axes: row by row, up to the diagonal.

    Raises:
        ValueError: Draws are not finite or not of shape (n, D), or sizes do not agree.
    """
    import matplotlib.pyplot as plt

    named = samples if isinstance(samples, Mapping) else {"": samples}
    sets = {name: as_columns(f"samples {name}".strip(), draws) for name, draws in named.items()}
    dim, truth, ranges = _checked_corner(sets, truth, limits)
    labels = checked_labels(labels, dim)
    if figure is None:
        side = max(3.0, (1.7 if dim < 6 else 1.15) * dim + 0.8)
        figure = plt.figure(figsize=(side, side))
    width, height = figure.get_size_inches()
    left, bottom, top = 0.75 / width, 0.75 / height, 1 - 0.4 / height
    grid = figure.subplots(dim, dim, squeeze=False)
    figure.subplots_adjust(left, bottom, 0.97, top, wspace=0.06, hspace=0.06)
    for row, col in np.ndindex(dim, dim):
        ax: Any = grid[row, col]
        if col > row:
            ax.remove()
            continue
        for i, (name, draws) in enumerate(sets.items()):
            if row == col:
                _draw_marginal(ax, draws[:, col], ranges[col], i, name)
            else:
                _draw_pair(ax, draws[:, [col, row]], (ranges[col], ranges[row]), i, levels)
        _format_panel(ax, row, col, ranges, labels)
        if truth is not None:
            ax.axvline(truth[col], color="black", lw=0.9)
            if row != col:
                ax.axhline(truth[row], color="black", lw=0.9)
    figure.align_labels()
    if any(sets):
        handles = grid[0, 0].get_legend_handles_labels()[0]
        placement = {"loc": "upper right", "ncols": len(handles) if dim == 1 else 1}
        figure.legend(handles=handles, frameon=False, **placement)
    return figure


def _checked_corner(
    sets: Mapping[str, np.ndarray], truth: Any, limits: Any
) -> tuple[int, np.ndarray | None, np.ndarray]:
    """Check that all sizes agree.

    Returns:
        The number of parameters D, the true parameters (D,) or None, and axis ranges (D, 2).
    """
    dims = {draws.shape[1] for draws in sets.values()}
    if len(dims) != 1:
        raise ValueError(f"samples: expected draws of one dimension D, got {sorted(dims)}")
    dim = dims.pop()
    truth = None if truth is None else np.asarray(truth, float)
    if truth is not None and truth.shape != (dim,):
        raise ValueError(f"truth: expected shape ({dim},), got {truth.shape}")
    if limits is None:
        return dim, truth, _axis_ranges(sets, truth)
    if np.shape(limits) != (dim, 2):
        raise ValueError(f"limits: expected shape ({dim}, 2), got {np.shape(limits)}")
    return dim, truth, np.asarray(limits, float)


def _axis_ranges(sets: Mapping[str, np.ndarray], truth: np.ndarray | None) -> np.ndarray:
    """Return axis ranges (D, 2) that hold the central 99.6% of all draws, and the truth."""
    central = [np.quantile(draws, [0.002, 0.998], axis=0) for draws in sets.values()]
    marks = np.concatenate(central if truth is None else [*central, truth[None]])
    low, high = marks.min(axis=0), marks.max(axis=0)
    pad = np.where(high > low, 0.06 * (high - low), 0.5)
    padded = np.stack([low - pad, high + pad], axis=1)
    # Padding stops at the outermost draw: at an edge of the prior's support the density jumps.
    values = np.concatenate([*sets.values(), marks])
    clipped = np.clip(padded, values.min(axis=0)[:, None], values.max(axis=0)[:, None])
    return np.where((high > low)[:, None], clipped, padded)


def _draw_marginal(ax: Axes, draws: np.ndarray, ends: np.ndarray, i: int, name: str) -> None:
    """Draw the smoothed histogram of one parameter's draws (n,) in the style of line i."""
    from scipy.ndimage import gaussian_filter1d

    counts, edges = np.histogram(draws, bins=MARGINAL_BINS, range=tuple(ends))
    smooth = gaussian_filter1d(counts / len(draws), _smoothing_bins(len(draws), MARGINAL_BINS))
    centers = (edges[1:] + edges[:-1]) / 2
    ax.plot(centers, smooth, lw=1.4, label=name, **line_style(i))
    if i == 0:
        ax.fill_between(centers, smooth, color=COLOURS[0], alpha=0.2, lw=0)


def _draw_pair(ax: Axes, draws: np.ndarray, ends: Any, i: int, levels: Sequence[float]) -> None:
    """Draw highest-density contours of a smoothed histogram of draws (n, 2)."""
    from scipy.ndimage import gaussian_filter

    counts, xs, ys = np.histogram2d(*draws.T, bins=PAIR_BINS, range=[tuple(e) for e in ends])
    density = gaussian_filter(counts, _smoothing_bins(len(draws), PAIR_BINS)).T
    descending = np.sort(density.ravel())[::-1]
    if descending[0] <= 0:
        return  # no draw lies within the limits
    mass = np.cumsum(descending) / descending.sum()
    last = mass.size - 1
    heights = np.unique(descending[np.searchsorted(mass, np.sort(levels)).clip(max=last)])
    centers = (xs[1:] + xs[:-1]) / 2, (ys[1:] + ys[:-1]) / 2
    style = line_style(i)
    if i == 0:
        ax.contourf(*centers, density, [*heights, np.inf], colors=style["color"], alpha=0.2)
        ax.contourf(*centers, density, [heights[-1], np.inf], colors=style["color"], alpha=0.3)
    ax.contour(*centers, density, heights, colors=style["color"], linestyles=style["ls"])


def _smoothing_bins(num_draws: int, bins: int) -> float:
    """Return the smoothing width in bins.

    The width is 2.2% of the axis for 10,000 draws, and larger for fewer draws.
    """
    return 0.022 * bins * (10_000 / num_draws) ** 0.25


def _format_panel(ax: Axes, row: int, col: int, ranges: Any, labels: Sequence[str]) -> None:
    """Set limits, ticks and labels of one panel."""
    from matplotlib.ticker import MaxNLocator

    last, fontsize = len(labels) - 1, "small" if len(labels) < 6 else "x-small"
    ax.set_xlim(*ranges[col])
    ax.xaxis.set_major_locator(MaxNLocator(3, prune="both"))
    ax.tick_params(labelsize=fontsize, length=2)
    ax.tick_params(axis="x", labelrotation=45, labelbottom=row == last)
    if row == last:
        ax.set_xlabel(labels[col], fontsize=fontsize)
    if row == col:
        ax.set(yticks=[], ylim=(0, None))
        ax.spines[["left", "right", "top"]].set_visible(False)
        return
    ax.set_ylim(*ranges[row])
    ax.yaxis.set_major_locator(MaxNLocator(3, prune="both"))
    ax.tick_params(axis="y", labelleft=col == 0)
    if col == 0:
        ax.set_ylabel(labels[row], fontsize=fontsize)


def predictive(
    observed: Any,
    simulated: Any,
    *,
    time: Any | None = None,
    transform: Callable[[Any], Any] | None = None,
    levels: Sequence[float] = (0.5, 0.9),
    labels: Sequence[str] | None = None,
    time_label: str = "time",
    ax: Any = None,
) -> Any:
    """Plot posterior predictions of a series: median, central bands and the observed data.

    Args:
        observed: The data, shape (T,), or (T, C) for C channels.
        simulated: Simulations at posterior draws, shape (n, T) or (n, T, C). Rows with NaN or
            infinity are failed simulations and are left out.
        time: Times of the T points; 0, 1, ... by default.
        transform: Function applied to data and simulations before drawing, for example `jnp.exp`
            for logarithms.
        levels: Probabilities of the central bands.
        labels: Names of the channels.
        time_label: Label of the time axis.
        ax: Axes for one channel, or a sequence of C axes; new axes by default.

    Returns:
        The axes for data of shape (T,); an array of C axes for shape (T, C).

    Raises:
        ValueError: Shapes do not agree, or no simulation is finite.
    """
    from matplotlib.ticker import MaxNLocator

    observed, simulated, times = _checked_series(observed, simulated, time)
    if transform is not None:
        observed, simulated = np.asarray(transform(observed)), np.asarray(transform(simulated))
    single, observed = observed.ndim == 1, observed.reshape(len(times), -1)
    simulated = simulated.reshape(-1, *observed.shape)
    labels = checked_labels(labels, observed.shape[1])
    panels = _channel_panels(ax, observed.shape[1])
    for c, panel in enumerate(panels):
        colour, series = COLOURS[c % len(COLOURS)], simulated[..., c]
        for i, level in enumerate(sorted(levels, reverse=True)):
            low, high = np.quantile(series, [0.5 - level / 2, 0.5 + level / 2], axis=0)
            style = {"color": colour, "alpha": 0.2 + 0.2 * i, "lw": 0, "label": f"{level:.0%}"}
            panel.fill_between(times, low, high, **style)
        panel.plot(times, np.median(series, axis=0), color=colour, lw=1.6, label="median")
        panel.plot(times, observed[:, c], "o", color="black", ms=3.5, label="observed")
        panel.set_ylabel(labels[c] or "x")
        panel.margins(x=0.02)
    above_axes = {"ncols": len(levels) + 2, "loc": "lower left", "bbox_to_anchor": (0.0, 1.0)}
    panels[0].legend(frameon=False, fontsize="small", **above_axes)
    panels[-1].set_xlabel(time_label)
    if np.issubdtype(times.dtype, np.integer):
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return panels[0] if single else panels


def _checked_series(
    observed: Any, simulated: Any, time: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return data (T, ...), finite simulations (n, T, ...) and times (T,) after shape checks."""
    observed, simulated = np.asarray(observed, float), np.asarray(simulated, float)
    if observed.ndim not in (1, 2):
        raise ValueError(f"observed: expected shape (T,) or (T, C), got {observed.shape}")
    if simulated.shape[1:] != observed.shape:
        raise ValueError(f"simulated: expected (n, *{observed.shape}), got {simulated.shape}")
    finite = np.isfinite(simulated).all(axis=tuple(range(1, simulated.ndim)))
    if not np.any(finite):
        raise ValueError("simulated: expected finite rows, got none")
    times = np.arange(len(observed)) if time is None else np.asarray(time)
    if times.shape != observed.shape[:1]:
        raise ValueError(f"time: expected shape ({len(observed)},), got {times.shape}")
    return observed, simulated[finite], times


def _channel_panels(ax: Any, channels: int) -> np.ndarray:
    """Return one axes per channel, shape (C,): those of the caller, or new ones."""
    import matplotlib.pyplot as plt

    if ax is None:
        size_inches = (6.4, 0.6 + 2.2 * channels)
        figure = plt.figure(figsize=size_inches, layout="constrained")
        return figure.subplots(channels, sharex=True, squeeze=False)[:, 0]
    panels = np.atleast_1d(np.asarray(ax, object))
    if panels.shape != (channels,):
        raise ValueError(f"ax: expected {channels} axes, got {panels.size}")
    return panels
