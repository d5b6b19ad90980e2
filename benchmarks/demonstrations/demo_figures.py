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
    """Save the corner plot, the posterior predictive plot, the check and the losses as PNG files.

    Args:
        folder: Output folder.
        labels: Labels of the D parameters.
        draws: Posterior draws (n, D) by method.
        log_counts: The data, log thousands of pelts, shape (21, 2).
        predictions: Simulations at posterior draws, shape (n, 21, 2).
        report: Report of `sf.check`.
        history: History of the fit.

    Returns:
        The paths of the files.
    """
    import matplotlib

    from simulators.gallery.lynx_hare import FIRST_YEAR

    backend = matplotlib.get_backend()
    matplotlib.use("Agg")  # files only: no display is needed
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
