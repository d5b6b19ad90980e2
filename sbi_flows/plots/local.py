"""Figures for one observation: sensitivity, discrepancies and the local check.

Public names: `heat_map`, `histograms`, `probabilities`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_flows.plots.style import COLOURS, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LABELLED_CELLS = 200
"""Heat maps with more cells than this show colours only, without printed values."""

PANELS_PER_ROW = 3


def heat_map(
    values: Any,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Plot signed values as colours: zero white, negative blue, positive vermilion, NaN grey.

    Args:
        values: Shape (R, K).
        rows: Names of the R rows, the first at the top.
        columns: Names of the K columns.
        label: Label of the colour bar.
        ax: Axes to draw on; new axes by default.

    Returns:
        The axes.

    Raises:
        ValueError: The numbers of names are not R and K.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    values = np.asarray(values, float)
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"values: expected shape {(len(rows), len(columns))}, got {values.shape}")
    if ax is None:
        width, height = 2.2 + 0.62 * len(columns), 1.8 + 0.36 * len(rows)
        ax = plt.subplots(figsize=(max(width, 4.4), height), layout="constrained")[1]
    colours = LinearSegmentedColormap.from_list("signed", [COLOURS[0], "white", COLOURS[1]])
    colours = colours.with_extremes(bad=GREY)
    magnitudes = np.abs(values[np.isfinite(values)])
    limit = max(float(magnitudes.max()) if magnitudes.size else 0.0, 1e-12)
    image = ax.imshow(values, cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
    ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0, labelsize="small")
    ax.spines[:].set_visible(False)
    if values.size <= MAX_LABELLED_CELLS:
        _print_values(ax, values, limit)
    bar = ax.figure.colorbar(image, ax=ax, location="bottom", shrink=0.8, aspect=30)
    bar.set_label(label, fontsize="small")
    bar.ax.tick_params(labelsize="small")
    bar.outline.set_visible(False)
    return ax


def _print_values(ax: Axes, values: np.ndarray, limit: float) -> None:
    """Print each value in its cell: white text on strong colours, "?" for NaN."""
    for (i, j), value in np.ndenumerate(values):
        is_dark = np.isfinite(value) and abs(value) > 0.7 * limit
        text = f"{value:+.2f}" if np.isfinite(value) else "?"
        style = {"ha": "center", "va": "center", "fontsize": "x-small"}
        style["color"] = "white" if is_dark else "black"
        ax.text(j, i, text, None, **style)


def histograms(simulated: Any, observed: Any, *, titles: Sequence[str]) -> Figure:
    """Plot one panel per quantity: a histogram of its simulated values and its observed value.

    The observed value is a vertical line. If its rows differ, they form a second histogram.

    Args:
        simulated: Simulated values, shape (n, K).
        observed: Observed values, shape (n, K).
        titles: Titles of the K panels.

    Returns:
        The figure, with K axes.

    Raises:
        ValueError: The shapes of `simulated`, `observed` and `titles` do not agree.
    """
    simulated, observed = np.asarray(simulated, float), np.asarray(observed, float)
    if simulated.shape != observed.shape or simulated.shape[1:] != (len(titles),):
        raise ValueError(
            f"observed: expected shape (n, {len(titles)}) as simulated has, got "
            f"{observed.shape} and {simulated.shape}"
        )
    panels = _panels(len(titles), (2.6, 2.1), (0.6, 0.4))
    for i, (ax, title) in enumerate(zip(panels, titles, strict=True)):
        edges = _bin_edges(simulated[:, i], observed[:, i])
        ax.hist(simulated[:, i], edges, color=GREY, alpha=0.5, lw=0, label="simulated")
        if np.ptp(observed[:, i]) > 0:
            style = {"histtype": "step", "color": COLOURS[1], "lw": 1.4}
            ax.hist(observed[:, i], edges, label="observed", **style)
        else:
            ax.axvline(observed[0, i], color=COLOURS[1], lw=1.6, label="observed")
        ax.set_title(title, fontsize="small")
        ax.set(yticks=[])
        ax.tick_params(labelsize="small")
        ax.spines[["left", "right", "top"]].set_visible(False)
    figure = panels[0].figure
    handles = panels[0].get_legend_handles_labels()[0]
    figure.legend(
        handles=handles, frameon=False, fontsize="small", ncols=2, loc="outside upper left"
    )
    return figure


def _panels(
    count: int,
    panel_inches: tuple[float, float],
    margin_inches: tuple[float, float],
    **shared: Any,
) -> np.ndarray:
    """Make a figure of `count` axes in rows of `PANELS_PER_ROW`; return the axes, shape (count,).

    `shared` are keyword arguments of `Figure.subplots`.
    """
    import matplotlib.pyplot as plt

    columns = min(PANELS_PER_ROW, count)
    rows = -(-count // columns)
    size = (
        panel_inches[0] * columns + margin_inches[0],
        panel_inches[1] * rows + margin_inches[1],
    )
    figure = plt.figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    for ax in grid.ravel()[count:]:
        ax.remove()
    return grid.ravel()[:count]


def _bin_edges(simulated: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Return edges of 40 bins over the central 98% of the values.

    If all values are integers with a span of at most 60, each integer has one bin.
    """
    sets = [values[np.isfinite(values)] for values in (simulated, observed)]
    central = [np.quantile(v, [0.01, 0.99], method="nearest") for v in sets if v.size]
    low, high = (np.min(central), np.max(central)) if central else (0.0, 1.0)
    values = np.concatenate(sets)
    if high - low <= 60 and np.all(values == np.round(values)):
        return np.arange(low - 0.5, high + 1.0)
    return np.linspace(low, high if high > low else low + 1.0, 41)


def probabilities(
    labels: Sequence[str],
    draws: Any,
    probability: Any,
    *,
    points: Any,
    curve: Any,
    band: Any,
    title: str = "",
) -> Figure:
    """Plot a classifier's probability of "true parameter" against each parameter.

    The classifier separates true parameters from posterior draws. Where the probability is above
    1/2, the posterior has too little mass.

    Args:
        labels: Names of the D parameters.
        draws: Posterior draws at the observation, shape (n, D).
        probability: Probability at each draw, shape (n,).
        points: Parameter values of the mean curve, shape (D, K).
        curve: Mean probability at these values, shape (D, K).
        band: Lower and upper edge of the 90% band under the null hypothesis, shape (2, D, K).
        title: Title of the figure.

    Returns:
        The figure, with one axes per parameter.
    """
    draws, probability, band = np.asarray(draws), np.asarray(probability), np.asarray(band)
    panels = _panels(len(labels), (3.2, 2.6), (0.8, 0.8), sharey=True)
    for i, (ax, label) in enumerate(zip(panels, labels, strict=True)):
        ax.plot(draws[:, i], probability, ".", color=COLOURS[0], ms=2, alpha=0.25, mew=0)
        null_band = {"color": GREY, "alpha": 0.4, "lw": 0, "label": "90% by chance"}
        ax.fill_between(points[i], *band[:, i], **null_band)
        ax.plot(points[i], curve[i], color=COLOURS[1], lw=1.6, label="mean")
        ax.axhline(0.5, color=GREY, lw=0.8)
        ax.set(xlabel=label, ylim=(0, 1))
    for ax in panels[::PANELS_PER_ROW]:
        ax.set_ylabel("probability of truth\n(above 1/2: too few draws)")
    panels[0].legend(frameon=False, fontsize="small", loc="upper right")
    figure = panels[0].figure
    figure.suptitle(textwrap.fill(title, 34 * min(PANELS_PER_ROW, len(labels))), fontsize="medium")
    return figure
