"""Expected coverage of highest-density regions and of central intervals.

Public names: `coverage`, `Coverage`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sbi_flows.core.tables import p_text, table
from sbi_flows.core.typing import Key
from sbi_flows.diagnostics.ranks import Ranks, draw_pass
from sbi_flows.diagnostics.uniformity import ks_p_value
from sbi_flows.posteriors.base import PosteriorLike
from sbi_flows.simulations.simulations import Simulations

LEVELS = np.arange(1, 100) / 100


@dataclasses.dataclass(frozen=True, repr=False)
class Coverage:
    """How often credible regions hold the truth, against how often they should.

    Attributes:
        labels: Names of the D parameters.
        density_ranks: Continuous share r* of draws denser than the truth, in (0, 1), shape (N,):
            the level of the smallest highest-density region that holds the truth. It is known to
            1 / 100, or to 1 / 8 where each density is an ODE to solve, and random within that: the
            ranks of a correct posterior are uniform all the same, but `expected` of a wrong one
            strays less far from the levels.
        levels: Credibility levels, .01 to .99, shape (K,).
        expected: Share of truths inside the joint highest-density region of each level, shape
            (K,); on or above the level is conservative.
        lower: Lower edge of the binomial 95% band at each level by itself, shape (K,).
        upper: Upper edge of it, shape (K,).
        central: Share of truths inside each parameter's central interval, shape (K, D).
        ks: P-value of the Kolmogorov-Smirnov test of r* against U(0, 1).
        ks_over_confident: P-value of the one-sided test, small when coverage falls short.
        num_failed: Simulations left out because they failed.
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
        """The table of `summary`."""
        return self.summary()

    def at(self, level: float) -> float:
        """Share of truths inside the highest-density region of one level between 0 and 1."""
        if not 0 < level < 1:
            raise ValueError(f"level: expected a number between 0 and 1, got {level}")
        return float(np.mean(self.density_ranks <= level))

    def summary(self) -> str:
        """Coverage of the 50%, 80%, 90% and 95% regions."""
        shown = [49, 79, 89, 94]
        rows = ["joint (HPD)", *self.labels]
        columns = {
            f"{self.levels[i]:.0%}": (f"{c:.3f}" for c in (self.expected[i], *self.central[i]))
            for i in shown
        }
        head = f"Coverage: {len(self.density_ranks)} data sets, HPD KS p {p_text(self.ks)}"
        return f"{head}\n{table(rows, columns)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, fit for JSON."""
        return {
            "ks": self.ks,
            "ks_over_confident": self.ks_over_confident,
            "levels": self.levels.tolist(),
            "expected": self.expected.tolist(),
            "central": {m: self.central[:, i].tolist() for i, m in enumerate(self.labels)},
        }

    def plot(self, ax: Any | None = None) -> Any:
        """Expected coverage of the joint regions against their level, with the binomial band."""
        from sbi_flows.plots.calibration import coverage_curve

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
    """Expected coverage of a posterior on simulations that it has not seen.

    Args:
        key: Random key.
        posterior: The posterior to check; its density may be unnormalised.
        simulations: Fresh pairs (theta, x) from the prior and the simulator; failed rows are left
            out and counted.
        draws: Independent draws from each posterior.
        progress: Show a progress bar.

    Returns:
        Coverage at a grid of levels, jointly and per parameter.

    Raises:
        ValueError: Fewer than 50 simulations that succeeded, fewer than 20 draws, or parameters
            of another width than the posterior's.
        SbiFlowsError: The posterior gave NaN, or draws that are not finite.

    References:
        Hermans et al. 2022, A Trust Crisis In Simulation-Based Inference?, arXiv:2110.06581,
        eq. 4. Deistler et al. 2022, Truncated proposals for scalable and hassle-free
        simulation-based inference, arXiv:2210.04815, algorithm 2 (ranks of densities).
    """
    return coverage_of(draw_pass(key, posterior, simulations, draws=draws, progress=progress))


def coverage_of(ranks: Ranks) -> Coverage:
    """Coverage from ranks that a draw pass has taken."""
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
        # a central interval of a level holds the truth when its rank is that near to the middle
        central=_within(2.0 * np.abs(ranks.uniform - 0.5)),
        ks=ks_p_value(ranks.density),
        ks_over_confident=ks_p_value(ranks.density, alternative="less"),
        num_failed=ranks.num_failed,
    )


def _within(distances: np.ndarray) -> np.ndarray:
    """Share of the distances (N, D) at most each level, shape (K, D)."""
    ordered = np.sort(distances, axis=0)
    counts = [np.searchsorted(column, LEVELS, side="right") for column in ordered.T]
    return np.stack(counts, axis=1) / len(distances)
