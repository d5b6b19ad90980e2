"""Gain of fits against their number of simulations.

Internal name: `gain_curve`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sbi_flows.plots.style import COLOURS, axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def gain_curve(
    rows: np.ndarray,
    gain: np.ndarray,
    error: np.ndarray,
    more: np.ndarray,
    predicted: np.ndarray,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Plot gains of K fits, and gains predicted for F larger numbers of simulations.

    Args:
        rows: Numbers of simulations of the fits, shape (K,).
        gain: Gains in nats, shape (K,).
        error: Standard errors of the differences to the last gain, shape (K,).
        more: Larger numbers of simulations, shape (F,).
        predicted: Lower end, median and upper end of the predicted gains, shape (F, 3).
        ax: Axes to draw on; new axes by default.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ax = axes_or_new(ax, (4.8, 3.4))
    ax.errorbar(rows, gain, error, color=COLOURS[0], marker="o", ms=5, lw=1.4, label="fits")
    last = np.full((1, 3), gain[-1])
    x, band = np.r_[rows[-1], more], np.concatenate([last, predicted])
    ax.fill_between(x, band[:, 0], band[:, 2], color=COLOURS[1], alpha=0.2, lw=0, label="90%")
    ax.plot(x, band[:, 1], color=COLOURS[1], ls="--", lw=1.4, label="predicted")
    ax.set(xscale="log", xlabel="simulations", ylabel="gain over the prior (nats)")
    ticks = [rows[0], rows[-1], more[-1]]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.legend(frameon=False, fontsize="small", loc="lower right")
    return ax
