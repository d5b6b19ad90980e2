"""The report of `check_at`.

Public name: `LocalCheck`.
"""

from __future__ import annotations

import dataclasses
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_flows.core.tables import p_text, table
from sbi_flows.diagnostics.local_errors import LocalErrors
from sbi_flows.diagnostics.verdict import Finding
from sbi_flows.plots.local import probabilities

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, repr=False)
class LocalCheck:
    """Result of `check_at` for D parameters.

    Attributes:
        verdict: One sentence: the posterior is consistent with the true posterior at this
            observation, or it is not, and how it differs.
        p_value: P-value of the permutation test: (1 + number of values of `null` that are at least
            `statistic`) / (1 + P), for P permutations.
        statistic: Mean of (d - 1/2)^2 over posterior draws at the observation, where d is the
            classifier's probability of being a true parameter. 0 if draws and true parameters
            cannot be separated, 1/4 if they are always separated.
        null: The same statistic for classifiers trained on permuted labels, shape (P,).
        findings: Errors of the posterior, the most significant first; empty if none was found.
        labels: Names of the D parameters.
        shift: Posterior mean minus true mean near the observation, in posterior standard
            deviations, shape (D,).
        width: Posterior width divided by the correct width near the observation, shape (D,);
            below 1 if the posterior is too narrow.
        level: Probability of rejecting a correct posterior.
        draws: Posterior draws at the observation, in the parameters' units, shape (n, D).
        probability: The classifier's probability that each draw is a true parameter, shape (n,).
            Where it is above 1/2, the posterior has too little mass.
        errors: Errors of single parameters and of pairs of parameters, and the classifier's mean
            probability along each parameter.
        num_simulations: Number of simulations that succeeded.
        num_near: Number of simulations near the observation that the classifiers were trained on.
        num_failed: Number of failed simulations that were left out.
    """

    verdict: str
    p_value: float
    statistic: float
    null: np.ndarray
    findings: tuple[Finding, ...]
    labels: tuple[str, ...]
    shift: np.ndarray
    width: np.ndarray
    level: float
    draws: np.ndarray
    probability: np.ndarray
    errors: LocalErrors
    num_simulations: int
    num_near: int
    num_failed: int

    @property
    def consistent(self) -> bool:
        """True if the test does not reject: the posterior may be correct at the observation."""
        return self.p_value > self.level

    def __repr__(self) -> str:
        """Return the text of `summary`."""
        return self.summary()

    def summary(self) -> str:
        """Return the verdict, the test statistic, and a table with one line per parameter."""
        title = (
            f"local check with the nearest {self.num_near} of {self.num_simulations} simulations: "
            f"statistic {self.statistic:.2g}, {len(self.null)} permutations "
            f"{np.median(self.null):.2g} (median), {np.quantile(self.null, 0.95):.2g} (95%)"
        )
        if self.num_failed:
            title += f"; {self.num_failed} simulations failed and were left out"
        columns = {
            "shift (sd)": (f"{s:+.2f}" for s in self.shift),
            "p": map(p_text, self.errors.p_shift),
            "width": (f"x{w:.2f}" for w in self.width),
            "p ": map(p_text, self.errors.p_width),
        }
        lines = [textwrap.fill(self.verdict, 100), "", title, table(self.labels, columns)]
        lines.append("p-values of parameters are corrected for the number of tests (max-T)")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return verdict, test, findings and effect sizes as JSON data, without the draws."""
        return {
            "verdict": self.verdict,
            "consistent": self.consistent,
            "p_value": self.p_value,
            "level": self.level,
            "statistic": self.statistic,
            "null": self.null.tolist(),
            "findings": [dataclasses.asdict(f) for f in self.findings],
            "shift": dict(zip(self.labels, self.shift.tolist(), strict=True)),
            "width": dict(zip(self.labels, self.width.tolist(), strict=True)),
            "num_simulations": self.num_simulations,
            "num_near": self.num_near,
            "num_failed": self.num_failed,
        }

    def plot(self, most: int = 6) -> Figure:
        """Plot the probability of "true parameter" along each of the first `most` parameters."""
        first = slice(0, most)
        return probabilities(
            self.labels[first],
            self.draws[:, first],
            self.probability,
            points=self.errors.points[first],
            curve=self.errors.curve[first],
            band=self.errors.band[:, first],
            title=self.verdict,
        )
