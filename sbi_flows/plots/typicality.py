"""Figure of a misspecification test: entries of an observation compared with simulations.

Public names: `entries`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_flows.plots.style import COLOURS, GREY

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def entries(
    labels: Sequence[str],
    values: Mapping[str, Any],
    *,
    bands: Any,
    off: Any,
    title: str = "",
) -> Figure:
    """Plot the entries of an observation, one row each, over quantile bands of the simulations.

    Args:
        labels: Names of the C entries, the first at the top.
        values: Standardised values by name, shape (C,) each, one panel per name. The first panel
            shows `bands`; every other panel marks plus and minus two standard deviations.
        bands: Quantiles of the simulations at 0.5, 5, 50, 95 and 99.5%, shape (5, C).
        off: True for entries that are drawn in the highlight colour, shape (C,).
        title: Title of the figure.

    Returns:
        The figure, with one axes per name.
    """
    import matplotlib.pyplot as plt

    rows, bands, off = np.arange(len(labels)), np.asarray(bands), np.asarray(off)
    size_inches = (3.2 * len(values) + 1.2, 1.4 + 0.24 * len(labels))
    figure = plt.figure(figsize=size_inches, layout="constrained")
    panels = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    for i, (ax, (name, observed)) in enumerate(zip(panels, values.items(), strict=True)):
        if i == 0:
            for low, high, alpha in ((0, 4, 0.2), (1, 3, 0.35)):
                span = bands[high] - bands[low]
                ax.barh(rows, span, 0.7, left=bands[low], color=GREY, alpha=alpha, lw=0)
            ax.plot(bands[2], rows, "|", color=GREY, ms=8)
        else:
            ax.axvspan(-2, 2, color=GREY, alpha=0.2, lw=0)
        colours = np.where(off, COLOURS[1], COLOURS[0])
        ax.scatter(np.asarray(observed), rows, c=colours, s=22, zorder=3)
        ax.set_xlabel(f"sd from the simulations, {name}")
    panels[0].set_yticks(rows, labels, fontsize="small")
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    figure.suptitle(textwrap.fill(title, 34 * len(values)), fontsize="medium")
    return figure
