"""Simulations that failed: why, and where in the prior they lie.

Public names: `Failures`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from sbi_flows.simulations.worker import PRINTED

_PARTS = ("lowest third", "middle third", "highest third")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Failures:
    """Rows that failed, among all that were simulated.

    A failure that is more likely at some parameters than at others is information: the prior that
    a posterior is fitted with is the one of the parameters whose simulations are valid.
    `sf.fit_validity` learns how likely that is at each.

    Attributes:
        labels: One for each of the D parameters.
        theta: Parameters of all rows, shape (N, D).
        rows: Places of those that failed, shape (F,).
        reasons: The reason of each of them.
    """

    labels: tuple[str, ...]
    theta: np.ndarray
    rows: np.ndarray
    reasons: tuple[str, ...]

    def __len__(self) -> int:
        """Number of rows that failed."""
        return len(self.rows)

    @property
    def counts(self) -> dict[str, int]:
        """How often each reason occurs, without what the simulations printed; most first."""
        return dict(Counter(r.split(PRINTED)[0] for r in self.reasons).most_common())

    @property
    def shares(self) -> np.ndarray:
        """Share of rows that failed in the thirds of each parameter's values, shape (D, 3)."""
        failed = np.zeros(len(self.theta), bool)
        failed[self.rows] = True
        ranks = np.argsort(np.argsort(self.theta, axis=0), axis=0)
        thirds = np.minimum(3 * ranks // len(self.theta), 2)
        found = [[failed[column == third] for third in range(3)] for column in thirds.T]
        return np.array([[np.mean(part) if len(part) else 0.0 for part in row] for row in found])

    def __repr__(self) -> str:
        """The reasons, and a table of where in the prior the failures lie."""
        lines = [f"{len(self)} of {len(self.theta)} simulations failed"]
        lines += [f"{count:>8,}  {reason}" for reason, count in self.counts.items()]
        if len(self):
            width = max(map(len, self.labels))
            lines.append(" " * width + "".join(f"{part:>15}" for part in _PARTS))
            for label, shares in zip(self.labels, self.shares, strict=True):
                lines.append(f"{label:<{width}}" + "".join(f"{share:>15.1%}" for share in shares))
        return "\n".join(lines)

    def plot(self) -> Any:
        """Histograms of each parameter, of the rows that failed beside all others.

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
