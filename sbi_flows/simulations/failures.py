"""Failed simulations: the reasons of the failures, and the parameters at which they occur.

Public names: `Failures`, `report_failures`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from sbi_flows.core.errors import SbiFlowsWarning, SimulationFailed
from sbi_flows.simulations.simulations import Simulations
from sbi_flows.simulations.worker import PRINTED

_MAX_REASONS = 8
"""Maximum number of reasons that a warning lists."""

_THIRDS = ("lowest third", "middle third", "highest third")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Failures:
    """Failed rows among all rows of a store.

    A posterior is fitted to the valid simulations only. If simulations fail more often at some
    parameters than at others, the fit uses an effective prior: the distribution of the parameters
    with valid simulations. The fitted posterior is the posterior for this effective prior.
    `sf.fit_validity` learns the probability of a valid simulation as a function of the parameters.

    Attributes:
        labels: Names of the D parameters.
        theta: Parameters of all rows, shape (N, D).
        rows: Indices of failed rows, shape (F,).
        reasons: Reason of each failed row.
    """

    labels: tuple[str, ...]
    theta: np.ndarray
    rows: np.ndarray
    reasons: tuple[str, ...]

    def __len__(self) -> int:
        """Number of failed rows."""
        return len(self.rows)

    @property
    def counts(self) -> dict[str, int]:
        """Number of failed rows for each reason, the most frequent reason first.

        Output that a simulation printed is removed from its reason.
        """
        return dict(Counter(r.split(PRINTED)[0] for r in self.reasons).most_common())

    @property
    def shares(self) -> np.ndarray:
        """Fraction of failed rows among low, middle and high values of each parameter.

        The sorted values of each parameter are divided into three equal parts. The fractions have
        shape (D, 3).
        """
        failed = np.zeros(len(self.theta), bool)
        failed[self.rows] = True
        ranks = np.argsort(np.argsort(self.theta, axis=0), axis=0)
        thirds = np.minimum(3 * ranks // len(self.theta), 2)
        groups = [[failed[column == third] for third in range(3)] for column in thirds.T]
        return np.array([[np.mean(part) if len(part) else 0.0 for part in row] for row in groups])

    def __repr__(self) -> str:
        """Show the reasons, and `shares` for each parameter."""
        lines = [f"{len(self)} of {len(self.theta)} simulations failed"]
        lines += [f"{count:>8,}  {reason}" for reason, count in self.counts.items()]
        if len(self):
            width = max(map(len, self.labels))
            lines.append(" " * width + "".join(f"{part:>15}" for part in _THIRDS))
            for label, shares in zip(self.labels, self.shares, strict=True):
                lines.append(f"{label:<{width}}" + "".join(f"{share:>15.1%}" for share in shares))
        return "\n".join(lines)

    def plot(self) -> Any:
        """Plot histograms of each parameter, one for failed rows and one for valid rows.

        Returns:
            A matplotlib figure.
        """
        from matplotlib.figure import Figure

        dim = len(self.labels)
        columns = min(dim, 4)
        lines = -(-dim // columns)
        figure = Figure(figsize=(3 * columns, 2.4 * lines), layout="constrained")
        axes = np.ravel(figure.subplots(lines, columns, squeeze=False))
        others = np.setdiff1d(np.arange(len(self.theta)), self.rows)
        for i, (ax, label) in enumerate(zip(axes, self.labels, strict=False)):
            bins = np.histogram_bin_edges(self.theta[:, i], 30)
            for rows, name in ((others, "valid"), (self.rows, "failed")):
                if len(rows):
                    ax.hist(
                        self.theta[rows, i], bins, density=True, histtype="step", label=name, lw=1.5
                    )
            ax.set_xlabel(label)
            ax.set_yticks([])
        for ax in axes[dim:]:
            ax.remove()
        axes[0].legend(frameon=False)
        figure.suptitle(f"{len(self):,} of {len(self.theta):,} simulations failed")
        return figure


def report_failures(simulations: Simulations, reasons: Iterable[str], stacklevel: int) -> None:
    """Warn if rows are invalid; the warning gives the number of rows for each reason.

    Args:
        simulations: The simulations.
        reasons: Reasons of failed rows. All other invalid rows contain NaN or infinity.
        stacklevel: Stack level of the code that the warning points to, as in `warnings.warn`.

    Raises:
        SimulationFailed: All rows are invalid.
    """
    failed = len(simulations) - simulations.num_valid
    if not failed:
        return
    counts = Counter(reason.split(PRINTED)[0] for reason in reasons)
    counts["gave NaN or infinity"] = failed - counts.total()
    common = [f"{n} {reason}" for reason, n in counts.most_common() if n]
    summary = "; ".join(common[:_MAX_REASONS]) + ("; ..." if len(common) > _MAX_REASONS else "")
    if failed == len(simulations):
        is_nan = counts.keys() == {"gave NaN or infinity"} and not simulations.missing
        advice = ". If NaN marks a missing entry, give missing=True" if is_nan else ""
        raise SimulationFailed(f"all {failed} simulations failed: {summary}{advice}")
    warnings.warn(
        f"{failed} of {len(simulations)} simulations failed: {summary}; they are kept, marked "
        "invalid, and left out of training",
        SbiFlowsWarning,
        stacklevel=stacklevel,
    )
