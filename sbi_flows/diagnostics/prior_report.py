"""The report of `prior_sensitivity`.

Public names: `PriorSensitivity`, `Reweighted`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_flows.core.tables import table
from sbi_flows.plots.local import heat_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_SENSITIVITY = 0.05
"""Minimum sensitivity that `diagnosis` reports (arXiv:2107.14054, section 2.4)."""


@dataclasses.dataclass(frozen=True)
class Reweighted:
    """Change of the posterior of D parameters when its draws are re-weighted.

    Attributes:
        name: Name of the weights, for example "new prior" or "likelihood ** 0.8".
        shift: Change of each posterior mean, in posterior standard deviations, shape (D,).
        width: New standard deviation divided by the old one, shape (D,).
        effective: Effective sample size of the weighted draws.
        pareto_k: Shape parameter of a Pareto distribution fitted to the largest weights; see
            `posteriors.reweighting`.
        reliable: True if there are enough draws for these weights; otherwise shift and width are
            NaN.
        flat: True if all weights are equal, so that the posterior does not change.
    """

    name: str
    shift: np.ndarray
    width: np.ndarray
    effective: float
    pareto_k: float
    reliable: bool
    flat: bool

    def cell(self, i: int) -> str:
        """Return shift and width of parameter number i as the text of a table cell."""
        return f"{self.shift[i]:+.2f} x{self.width[i]:.2f}" if self.reliable else "?"

    def to_dict(self, parameters: tuple[str, ...]) -> dict[str, Any]:
        """Return all numbers as JSON data; shift and width are None if unreliable.

        Args:
            parameters: Names of the D parameters.
        """
        plain = {name: getattr(self, name) for name in ("effective", "pareto_k", "reliable")}
        shift, width = (self._by_name(v, parameters) for v in (self.shift, self.width))
        return {"shift": shift, "width": width, **plain, "flat": self.flat}

    def _by_name(self, values: np.ndarray, names: tuple[str, ...]) -> dict[str, float | None]:
        numbers = values.tolist() if self.reliable else [None] * len(names)
        return dict(zip(names, numbers, strict=True))


@dataclasses.dataclass(frozen=True, repr=False)
class PriorSensitivity:
    """Result of `prior_sensitivity` for D parameters.

    Attributes:
        parameters: Names of the D parameters.
        rows: Change of the posterior for each set of weights.
        sensitivity: Sensitivity of each parameter to each component ("prior", "likelihood",
            "prior of a"), shape (D,): cumulative Jensen-Shannon distance between the old and the
            new marginal per doubling of the component's power. Empty if another prior was given.
        notes: Sentences about components without effect and about unreliable weights.
        draws: Number of posterior draws.
    """

    parameters: tuple[str, ...]
    rows: tuple[Reweighted, ...]
    sensitivity: Mapping[str, np.ndarray]
    notes: tuple[str, ...]
    draws: int

    def __getitem__(self, name: str) -> Reweighted:
        """Return the row with the given name, for example `result["prior ** 0.8"]`."""
        by_name = {row.name: row for row in self.rows}
        if name not in by_name:
            raise KeyError(f"{name}: expected one of {', '.join(by_name)}")
        return by_name[name]

    @property
    def diagnosis(self) -> dict[str, str]:
        """Possible cause of the sensitivity, for each parameter that is sensitive to the prior."""
        if not self.sensitivity:
            return {}
        prior, likelihood = (
            self.sensitivity[c] >= MIN_SENSITIVITY for c in ("prior", "likelihood")
        )
        reasons = ("the prior rules, the data say little", "prior and data may pull apart")
        flags = zip(self.parameters, prior, likelihood, strict=True)
        return {name: reasons[int(both)] for name, is_sensitive, both in flags if is_sensitive}

    def __repr__(self) -> str:
        """Return the text of `summary`."""
        return self.summary()

    def summary(self) -> str:
        """Return shift and width of every parameter, the quality of the weights, and notes."""
        joint_rows = [row for row in self.rows if " of " not in row.name]
        indices = range(len(self.parameters))
        columns = {row.name: [row.cell(i) for i in indices] for row in joint_rows}
        for name in ("prior", "likelihood") if self.sensitivity else ():
            columns[f"{name} sensitivity"] = [f"{v:.2f}" for v in self.sensitivity[name]]
        diagnosis = self.diagnosis
        if diagnosis:
            columns[""] = [diagnosis.get(name, "") for name in self.parameters]
        weights = {
            "effective draws": [f"{row.effective:.0f}" for row in self.rows],
            "Pareto k": [f"{row.pareto_k:.2f}" for row in self.rows],
            "largest change": [self._largest_change(row) for row in self.rows],
        }
        return "\n".join(
            [
                f"sensitivity to the prior, {self.draws} draws re-weighted: shift of the mean in "
                "posterior sd, x change of the sd",
                table(self.parameters, columns),
                table([row.name for row in self.rows], weights),
                *self.notes,
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return rows, sensitivities, diagnosis and notes as JSON data."""
        sensitivity = {
            name: dict(zip(self.parameters, values.tolist(), strict=True))
            for name, values in self.sensitivity.items()
        }
        return {
            "rows": {row.name: row.to_dict(self.parameters) for row in self.rows},
            "sensitivity": sensitivity,
            "diagnosis": self.diagnosis,
            "notes": list(self.notes),
            "draws": self.draws,
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the shifts by parameter and set of weights as a heat map.

        Cells with unreliable weights are grey.
        """
        shifts = np.stack([row.shift for row in self.rows], axis=1)
        names = {"rows": self.parameters, "columns": [row.name for row in self.rows]}
        return heat_map(shifts, label="shift of the mean (posterior sd)", ax=ax, **names)

    def _largest_change(self, row: Reweighted) -> str:
        """Return the parameter that changes most, with its shift and width."""
        if row.flat or not row.reliable:
            return "nothing" if row.flat else "?"
        size = np.maximum(np.abs(row.shift), np.abs(np.log(row.width)))
        most = int(np.argmax(size))
        return f"{self.parameters[most]} {row.cell(most)}"
