"""Failed simulations: their reasons, and where in the prior they lie.

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
"""Maximum number of reasons that a warning names."""

_THIRDS = ("lowest third", "middle third", "highest third")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Failures:
    """Failed rows among all rows of a store.

    A posterior is fitted to the valid simulations. If some parameters fail more often than others,
    it is the posterior of another prior: that of the parameters whose simulations are valid.
    `sf.fit_validity` learns the probability of a valid simulation as a function of the parameters.

    Attributes:
        labels: One label for each of the D parameters.
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
        """Number of rows with each reason, without printed output; the most frequent first."""
        return dict(Counter(r.split(PRINTED)[0] for r in self.reasons).most_common())

    @property
    def shares(self) -> np.ndarray:
        """Fraction of failed rows in each third of each parameter's values, shape (D, 3)."""
        failed = np.zeros(len(self.theta), bool)
        failed[self.rows] = True
        ranks = np.argsort(np.argsort(self.theta, axis=0), axis=0)
        thirds = np.minimum(3 * ranks // len(self.theta), 2)
        groups = [[failed[column == third] for third in range(3)] for column in thirds.T]
        return np.array([[np.mean(part) if len(part) else 0.0 for part in row] for row in groups])

    def __repr__(self) -> str:
        """List the reasons, and the fraction of failed rows in each third of each parameter."""
        lines = [f"{len(self)} of {len(self.theta)} simulations failed"]
        lines += [f"{count:>8,}  {reason}" for reason, count in self.counts.items()]
        if len(self):
            width = max(map(len, self.labels))
            lines.append(" " * width + "".join(f"{part:>15}" for part in _THIRDS))
            for label, shares in zip(self.labels, self.shares, strict=True):
                lines.append(f"{label:<{width}}" + "".join(f"{share:>15.1%}" for share in shares))
        return "\n".join(lines)

    def plot(self) -> Any:
        """Draw histograms of each parameter, for failed and for valid rows.

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
    """Warn of invalid rows, with the number of rows for each reason.

    Args:
        simulations: The simulations.
        reasons: Reasons of rows that failed; all other invalid rows gave NaN or infinity.
        stacklevel: Level of the caller that the warning names, as for `warnings.warn`.

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
        raise SimulationFailed(f"all {failed} simulations failed: {summary}")
    warnings.warn(
        f"{failed} of {len(simulations)} simulations failed: {summary}; they are kept, marked "
        "invalid, and left out of training",
        SbiFlowsWarning,
        stacklevel=stacklevel,
    )
