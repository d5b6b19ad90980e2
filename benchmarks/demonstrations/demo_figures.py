"""Figures of the lynx and hare demonstration.

Public name: `save_figures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbi_flows import plots

DPI = 130


def save_figures(
    folder: Path,
    labels: Sequence[str],
    draws: Mapping[str, np.ndarray],
    log_counts: Any,
    predictions: np.ndarray,
    report: Any,
    history: Any,
) -> list[Path]:
    """Save PNG figures: corner plot, posterior predictive plot, calibration check and loss curves.

    Args:
        folder: Output folder.
        labels: Labels of the D parameters.
        draws: Posterior draws (n, D) of each method, by the name of the method.
        log_counts: The data, shape (21, 2): the log of the number of pelts in thousands.
        predictions: Simulations at posterior draws, shape (n, 21, 2).
        report: Report of `sf.check`.
        history: Training history returned by the fit.

    Returns:
        The paths of the files.
    """
    import matplotlib

    from simulators.gallery.lynx_hare import FIRST_YEAR

    backend = matplotlib.get_backend()
    matplotlib.use("Agg")  # this backend writes files and needs no display
    import matplotlib.pyplot as plt

    years = FIRST_YEAR + np.arange(len(log_counts))
    axes = plots.predictive(
        log_counts,
        predictions,
        time=years,
        transform=np.exp,
        labels=["hare pelts (thousands)", "lynx pelts (thousands)"],
        time_label="year",
    )
    figures = {
        "corner": plots.corner(draws, labels=labels),
        "predictive": axes[0].figure,
        "check": report.plot(),
        "losses": plots.loss_curves(history).figure,
    }
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI)
        plt.close(figure)
    matplotlib.use(backend)
    return paths
