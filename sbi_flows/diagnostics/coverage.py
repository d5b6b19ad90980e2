"""Expected coverage of highest-density regions and of central intervals.

Public names: `coverage`, `Coverage`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_flows.core.tables import p_text, table
from sbi_flows.core.typing import Key
from sbi_flows.diagnostics.ranks import Ranks, draw_pass
from sbi_flows.diagnostics.uniformity import ks_p_value
from sbi_flows.plots.calibration import coverage_curve
from sbi_flows.posteriors.adapter import PosteriorLike
from sbi_flows.posteriors.reuse import warn_of_reuse
from sbi_flows.simulations.simulations import Simulations

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS = np.arange(1, 100) / 100

TABLE_LEVELS = (49, 79, 89, 94)
"""Positions in `LEVELS` of the levels that tables show: 50, 80, 90 and 95%."""


@dataclasses.dataclass(frozen=True, repr=False)
class Coverage:
    """Share of true parameters inside credible regions, at each credibility level.

    Attributes:
        labels: Names of the D parameters.
        density_ranks: Level r* of the smallest highest-density region that contains the truth, in
            (0, 1), shape (N,). It is the share of draws with a higher density than the truth, in
            steps of 1/100, or of 1/8 if each density needs an ODE solve. Each r* is placed at
            random within its step, so that the r* of a correct posterior are exactly uniform. For
            a wrong posterior, coarse steps bring `expected` closer to `levels`.
        levels: Credibility levels, 0.01 to 0.99, shape (K,).
        expected: Share of truths inside the joint highest-density region of each level, shape
            (K,). The posterior is conservative where this share is at or above the level.
        lower: Lower edge of the pointwise binomial 95% band at each level, shape (K,).
        upper: Upper edge of the band at each level, shape (K,).
        central: Share of truths inside the central interval of each parameter, shape (K, D).
        ks: P-value of the Kolmogorov-Smirnov test of r* against U(0, 1).
        ks_over_confident: P-value of the one-sided test; small if coverage is below the levels.
        num_failed: Number of failed simulations that were left out.
    """

    labels: tuple[str, ...]
    density_ranks: np.ndarray
    levels: np.ndarray
    expected: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    central: np.ndarray
    ks: float
    ks_over_confident: float
    num_failed: int

    def __repr__(self) -> str:
        """Return the table of `summary`."""
        return self.summary()

    def at(self, level: float) -> float:
        """Return the share of truths inside the joint highest-density region of one level.

        Raises:
            ValueError: The level is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"level: expected a number between 0 and 1, got {level}")
        return float(np.mean(self.density_ranks <= level))

    def summary(self) -> str:
        """Return a table of the coverage of 50%, 80%, 90% and 95% regions."""
        rows = ["joint (HPD)", *self.labels]
        columns = {
            f"{self.levels[i]:.0%}": (f"{c:.3f}" for c in (self.expected[i], *self.central[i]))
            for i in TABLE_LEVELS
        }
        title = f"Coverage: {len(self.density_ranks)} data sets, HPD KS p {p_text(self.ks)}"
        return f"{title}\n{table(rows, columns)}"

    def to_dict(self) -> dict[str, Any]:
        """Return p-values and coverage curves as JSON data, without the ranks."""
        return {
            "ks": self.ks,
            "ks_over_confident": self.ks_over_confident,
            "levels": self.levels.tolist(),
            "expected": self.expected.tolist(),
            "central": {m: self.central[:, i].tolist() for i, m in enumerate(self.labels)},
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the coverage of joint regions against their level, with the binomial 95% band."""
        curve = {"HPD": self.expected}
        return coverage_curve(self.levels, curve, band=(self.lower, self.upper), ax=ax)


def coverage(
    key: Key,
    posterior: PosteriorLike,
    simulations: Simulations,
    *,
    draws: int = 1_000,
    progress: bool = False,
) -> Coverage:
    """Compute expected coverage on simulations that the posterior was not trained on.

    Args:
        key: Random key.
        posterior: The posterior to check; its density may be unnormalised.
        simulations: Pairs (theta, x) from the prior and the simulator, at least 50; failed rows
            are left out and counted.
        draws: Independent draws from each posterior, at least 20.
        progress: Show a progress bar.

    Returns:
        Coverage at a grid of levels, jointly and for each parameter.

    Raises:
        ValueError: Fewer than 50 simulations succeeded, there are fewer than 20 draws, or the
            number of parameters differs from the posterior's.
        SbiFlowsError: The posterior returned NaN, or draws that are not finite.

    References:
        Hermans et al. 2022, A Trust Crisis In Simulation-Based Inference?, arXiv:2110.06581,
        eq. 4.
        Deistler et al. 2022, Truncated proposals for scalable and hassle-free simulation-based
        inference, arXiv:2210.04815, algorithm 2 (ranks of densities).
    """
    warn_of_reuse(posterior, simulations, "simulations")
    return coverage_of(draw_pass(key, posterior, simulations, draws=draws, progress=progress))


def coverage_of(ranks: Ranks) -> Coverage:
    """Compute coverage from the result of `draw_pass`.

    Raises:
        ValueError: `draw_pass` was called with `density=False`, so that density ranks are missing.
    """
    from scipy import stats

    if ranks.density is None:
        raise ValueError("ranks: expected a draw pass with densities, got one without")
    n = len(ranks.density)
    return Coverage(
        labels=ranks.labels,
        density_ranks=ranks.density,
        levels=LEVELS,
        expected=np.mean(ranks.density[:, None] <= LEVELS[None], axis=0),
        lower=stats.binom.ppf(0.025, n, LEVELS) / n,
        upper=stats.binom.ppf(0.975, n, LEVELS) / n,
        # The truth is inside the central interval of level c if 2 |rank - 1/2| <= c.
        central=_share_within_levels(2.0 * np.abs(ranks.uniform - 0.5)),
        ks=ks_p_value(ranks.density),
        ks_over_confident=ks_p_value(ranks.density, alternative="less"),
        num_failed=ranks.num_failed,
    )


def _share_within_levels(distances: np.ndarray) -> np.ndarray:
    """For each level, return the share of distances (N, D) up to this level, shape (K, D)."""
    ascending = np.sort(distances, axis=0)
    counts = [np.searchsorted(column, LEVELS, side="right") for column in ascending.T]
    return np.stack(counts, axis=1) / len(distances)
