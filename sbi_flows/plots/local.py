"""Figures of what is asked at one observation: sensitivity, discrepancies, and a local check.

Public names: `heat_map`, `histograms`, `probabilities`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from sbi_flows.plots.figures import COLOURS, GREY

NUMBERS = 200
"""Most cells that have their number written into them."""

COLUMNS = 3
"""Panels side by side."""


def heat_map(
    values: Any,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str = "",
    ax: Any = None,
) -> Any:
    """Signed numbers as colours: white at zero, blue below, vermilion above, grey where NaN.

    Args:
        values: Shape (R, K).
        rows: Names of the R rows, the first at the top.
        columns: Names of the K columns.
        label: What the colours mean.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: Names of another number than the values have.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    values = np.asarray(values, float)
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"values: expected shape {(len(rows), len(columns))}, got {values.shape}")
    if ax is None:
        size = (2.2 + 0.62 * len(columns), 1.8 + 0.36 * len(rows))
        ax = plt.subplots(figsize=(max(size[0], 4.4), size[1]), layout="constrained")[1]
    colours = LinearSegmentedColormap.from_list("signed", [COLOURS[0], "white", COLOURS[1]])
    colours = colours.with_extremes(bad=GREY)
    finite = np.abs(values[np.isfinite(values)])
    most = max(float(finite.max()) if finite.size else 0.0, 1e-12)
    image = ax.imshow(values, cmap=colours, vmin=-most, vmax=most, aspect="auto")
    ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0, labelsize="small")
    ax.spines[:].set_visible(False)
    if values.size <= NUMBERS:
        for (i, j), value in np.ndenumerate(values):
            dark = np.isfinite(value) and abs(value) > 0.7 * most
            style = {"ha": "center", "va": "center", "fontsize": "x-small"}
            text = f"{value:+.2f}" if np.isfinite(value) else "?"
            ax.text(j, i, text, color="white" if dark else "black", **style)
    bar = ax.figure.colorbar(image, ax=ax, location="bottom", shrink=0.8, aspect=30)
    bar.set_label(label, fontsize="small")
    bar.ax.tick_params(labelsize="small")
    bar.outline.set_visible(False)
    return ax


def histograms(simulated: Any, observed: Any, *, titles: Sequence[str]) -> Any:
    """One panel a number: its histogram over simulations, the observed one a line.

    Args:
        simulated: Shape (n, K).
        observed: Shape (n, K): where it differs from row to row, a second histogram.
        titles: Text above each panel.

    Returns:
        The figure, with K axes.

    Raises:
        ValueError: Shapes that do not agree.
    """
    simulated, observed = np.asarray(simulated, float), np.asarray(observed, float)
    if simulated.shape != observed.shape or simulated.shape[1:] != (len(titles),):
        raise ValueError(
            f"observed: expected shape (n, {len(titles)}) as simulated has, got "
            f"{observed.shape} and {simulated.shape}"
        )
    panels = _panels(len(titles), (2.6, 2.1), (0.6, 0.4))
    for i, (ax, title) in enumerate(zip(panels, titles, strict=True)):
        values, own = simulated[:, i], observed[:, i]
        edges = _edges(values, own)
        ax.hist(values, edges, color=GREY, alpha=0.5, lw=0, label="simulated")
        if np.ptp(own) > 0:
            ax.hist(own, edges, histtype="step", color=COLOURS[1], lw=1.4, label="observed")
        else:
            ax.axvline(own[0], color=COLOURS[1], lw=1.6, label="observed")
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
    number: int, each: tuple[float, float], more: tuple[float, float], **shared: Any
) -> np.ndarray:
    """So many axes in rows of `COLUMNS`, sizes in inches."""
    import matplotlib.pyplot as plt

    across = min(COLUMNS, number)
    down = -(-number // across)
    size = (each[0] * across + more[0], each[1] * down + more[1])
    grid = plt.figure(figsize=size, layout="constrained").subplots(
        down, across, squeeze=False, **shared
    )
    for ax in grid.ravel()[number:]:
        ax.remove()
    return grid.ravel()[:number]


def _edges(simulated: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Edges of 40 bins over nearly all numbers; around each of few whole numbers."""
    sets = [values[np.isfinite(values)] for values in (simulated, observed)]
    bulk = [np.quantile(v, [0.01, 0.99], method="nearest") for v in sets if v.size]
    low, high = (np.min(bulk), np.max(bulk)) if bulk else (0.0, 1.0)
    every = np.concatenate(sets)
    if high - low <= 60 and np.all(every == np.round(every)):
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
) -> Any:
    """Probability of being a true parameter rather than a draw, along each parameter.

    Args:
        labels: Names of the D parameters.
        draws: Draws at the observation, shape (n, D).
        probability: Probability at each, shape (n,).
        points: Where the curves are, shape (D, K).
        curve: Mean probability there, shape (D, K).
        band: Edges of what comes by chance, shape (2, D, K).
        title: Text above.

    Returns:
        The figure, with one axes a parameter.
    """
    draws, probability, band = np.asarray(draws), np.asarray(probability), np.asarray(band)
    panels = _panels(len(labels), (3.2, 2.6), (0.8, 0.8), sharey=True)
    for i, (ax, label) in enumerate(zip(panels, labels, strict=True)):
        ax.plot(draws[:, i], probability, ".", color=COLOURS[0], ms=2, alpha=0.25, mew=0)
        chance = {"color": GREY, "alpha": 0.4, "lw": 0, "label": "90% by chance"}
        ax.fill_between(points[i], *band[:, i], **chance)
        ax.plot(points[i], curve[i], color=COLOURS[1], lw=1.6, label="mean")
        ax.axhline(0.5, color=GREY, lw=0.8)
        ax.set(xlabel=label, ylim=(0, 1))
    for ax in panels[::COLUMNS]:
        ax.set_ylabel("probability of truth\n(above 1/2: too few draws)")
    panels[0].legend(frameon=False, fontsize="small", loc="upper right")
    figure = panels[0].figure
    figure.suptitle(textwrap.fill(title, 34 * min(COLUMNS, len(labels))), fontsize="medium")
    return figure
