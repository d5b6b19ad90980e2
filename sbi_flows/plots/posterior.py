"""Corner plots of posterior draws, and posterior predictions over an observed series.

Public names: `corner`, `predictive`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_flows.plots.draws import DrawSets, as_draw_sets, as_truth
from sbi_flows.plots.panels import (
    Layout,
    axis_ranges,
    draw_marginal,
    draw_pair,
    draw_quantiles,
    estimate,
    format_panel,
    set_title,
)
from sbi_flows.plots.style import COLOURS, checked_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def corner(
    samples: Any,
    *,
    labels: Sequence[str] | None = None,
    truth: Any | None = None,
    levels: Sequence[float] = (0.5, 0.9),
    limits: Any | None = None,
    quantiles: Sequence[float] = (),
    titles: bool = False,
    figure: Figure | None = None,
) -> Figure:
    """Plot one- and two-dimensional marginals of one posterior, or of several overlaid.

    Each density is smoothed by an amount that its own draws determine, so that narrow modes keep
    their widths beside wide ones. The curves on the diagonal have the same peak height. A contour
    encloses the stated fraction of the draws of its set.

    Args:
        samples: Draws in one of these forms. The first set is drawn filled.

            - An array of shape (n, D).
            - A dict of named parameters: arrays of shape (n, *event), as
              `posterior.prior.unflatten(draws)` returns.
            - A dict of sets: each an array (n, D), or each a dict of named parameters.

            A dict whose arrays all have the shape (n, D) with one D is a dict of sets, unless the
            number of labels fits only the entries of all arrays together. Any other dict of arrays
            contains named parameters. Write `{"name": {...}}` to leave no doubt.
        labels: Names of the D parameters, for example `posterior.prior.labels`. Named parameters
            have the labels `alpha`, `beta[0]`, `beta[1]`, ... and are matched by name in all sets;
            `labels` then states their order.
        truth: True parameters, drawn as lines: an array of shape (D,), or a dict of numbers and
            arrays by name, which is matched with the labels.
        levels: Probabilities of the highest-density regions that the contours enclose.
        limits: Lower and upper end of each parameter's axis, shape (D, 2); by default the range
            of nearly all draws.
        quantiles: Probabilities of the quantiles of the first set, drawn as dashed lines on the
            diagonal, for example (0.16, 0.5, 0.84).
        titles: Whether to write the median of the first set and the distances to its 84% and 16%
            quantiles above the diagonal, as in "alpha = 1.23 +0.10 -0.09".
        figure: Figure to draw on; a new figure by default.

    Returns:
        The figure, with D (D + 1) / 2 axes: row by row, up to the diagonal.

    Raises:
        ValueError: Draws are not finite or have none of these forms, sizes do not agree, names of
            parameters differ, or a quantile is not between 0 and 1.

    Example:
        >>> import numpy as np
        >>> normal = np.random.default_rng(0).normal
        >>> draws = {"rate": normal(size=500), "place": normal(size=(500, 2))}
        >>> figure = corner(draws, truth={"place": [0.0, 0.0], "rate": 0.0}, titles=True)
        >>> [ax.get_xlabel() for ax in figure.axes[-3:]]
        ['rate', 'place[0]', 'place[1]']
    """
    draws = as_draw_sets(samples, labels)
    if not all(0 <= q <= 1 for q in quantiles):
        raise ValueError(f"quantiles: expected probabilities from 0 to 1, got {tuple(quantiles)}")
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels: expected probabilities between 0 and 1, got {tuple(levels)}")
    values = as_truth(truth, draws)
    layout = Layout(draws.labels, _checked_ranges(draws, values, limits))
    figure, grid = _panel_grid(draws, figure, titles=titles)
    estimates = {name: estimate(each, layout.ranges) for name, each in draws.sets.items()}
    first = next(iter(draws.sets.values()))
    for row, col in np.ndindex(draws.dim, draws.dim):
        ax: Any = grid[row, col]
        if col > row:
            ax.remove()
            continue
        for i, (name, each) in enumerate(estimates.items()):
            if row == col:
                draw_marginal(ax, each, col, i, name)
            else:
                draw_pair(ax, each, (col, row), i, levels)
        format_panel(ax, row, col, layout)
        if values is not None:
            _draw_truth(ax, values, row, col)
        if row == col:
            draw_quantiles(ax, first[:, col], quantiles)
    if titles:
        for i, label in enumerate(draws.labels):
            set_title(grid[i, i], label, first[:, i])
    figure.align_labels()
    if any(draws.sets):
        handles = grid[0, 0].get_legend_handles_labels()[0]
        placement = {"loc": "upper right", "ncols": len(handles) if draws.dim == 1 else 1}
        figure.legend(handles=handles, frameon=False, **placement)
    return figure


def _checked_ranges(draws: DrawSets, truth: np.ndarray | None, limits: Any) -> np.ndarray:
    """Return the ends of each axis, shape (D, 2), from the user's limits or from the draws."""
    if limits is None:
        return axis_ranges(draws.sets, truth)
    if np.shape(limits) != (draws.dim, 2):
        raise ValueError(f"limits: expected shape ({draws.dim}, 2), got {np.shape(limits)}")
    ends = np.asarray(limits, float)
    if not np.all(np.isfinite(ends)) or not np.all(ends[:, 0] < ends[:, 1]):
        raise ValueError(f"limits: expected finite lower ends below upper ends, got {limits}")
    return ends


def _panel_grid(draws: DrawSets, figure: Figure | None, *, titles: bool) -> tuple[Figure, Any]:
    """Return the figure and its axes (D, D), with margins for labels, titles and a legend."""
    import matplotlib.pyplot as plt

    dim = draws.dim
    if figure is None:
        side = max(3.0, (1.7 if dim < 6 else 1.15) * dim + 0.8)
        figure = plt.figure(figsize=(side, side))
    width, height = figure.get_size_inches()
    # a single panel has its legend above the title
    inches = 0.75 if titles and dim == 1 and any(draws.sets) else 0.4
    grid = figure.subplots(dim, dim, squeeze=False)
    left, bottom, top = 0.75 / width, 0.75 / height, 1 - inches / height
    figure.subplots_adjust(left, bottom, 0.97, top, wspace=0.06, hspace=0.06)
    return figure, grid


def _draw_truth(ax: Axes, truth: np.ndarray, row: int, col: int) -> None:
    """Draw the true parameters in one panel as lines."""
    ax.axvline(truth[col], color="black", lw=0.9)
    if row != col:
        ax.axhline(truth[row], color="black", lw=0.9)


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
