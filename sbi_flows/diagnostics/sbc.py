"""Simulation-based calibration: where the truth ranks among posterior draws, per parameter.

Public names: `sbc`, `SBC`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from scipy import special

from sbi_flows.core.tables import p_text, table
from sbi_flows.core.typing import Key
from sbi_flows.diagnostics.ranks import Ranks, draw_pass
from sbi_flows.diagnostics.uniformity import ecdf_band, ks_p_value, log_gamma, normal_p_values
from sbi_flows.posteriors.base import PosteriorLike
from sbi_flows.simulations.simulations import Simulations


@dataclasses.dataclass(frozen=True, repr=False)
class SBC:
    """Ranks of the true parameters, and tests that they are uniform. Arrays run over parameters.

    Attributes:
        labels: Names of the D parameters.
        draws: Number of draws L from each posterior.
        uniform: Continuous ranks in (0, 1), shape (N, D): ties broken and each integer rank spread
            over its cell at random, so that the tests for continuous values are exact.
        ks: P-values of the Kolmogorov-Smirnov test, shape (D,).
        location: P-values of the test for a shift, shape (D,); see `normal_p_values`.
        spread: P-values of the test for a wrong width, shape (D,).
        log_gamma: log(gamma / its 5% null quantile), shape (D,); below 0 rejects at 5%.
        shift: How far the posterior lies too high, in its own standard deviations, shape (D,).
        width: How many times too wide the posterior is, shape (D,); below 1 is too narrow.
        num_failed: Simulations left out because they failed.
        beyond: Whether significantly many truths lie beyond all draws, shape (D,). How far beyond,
            ranks do not tell: shift and width are then bounds of what is wrong, and a posterior
            that only seems too wide because of it is not tested for that (its p-value is 1).
    """

    labels: tuple[str, ...]
    draws: int
    uniform: np.ndarray
    ks: np.ndarray
    location: np.ndarray
    spread: np.ndarray
    log_gamma: np.ndarray
    shift: np.ndarray
    width: np.ndarray
    num_failed: int
    beyond: np.ndarray

    @property
    def ranks(self) -> np.ndarray:
        """Integer ranks from 0 to L with ties broken at random, shape (N, D)."""
        return np.minimum((self.uniform * (self.draws + 1)).astype(int), self.draws)

    def __repr__(self) -> str:
        """The table of `summary`."""
        return self.summary()

    def summary(self) -> str:
        """One line a parameter."""
        head = f"SBC: {len(self.uniform)} data sets x {self.draws} draws"
        columns = {
            "KS p": map(p_text, self.ks),
            "shift p": map(p_text, self.location),
            "width p": map(p_text, self.spread),
            "log-gamma": (f"{g:.1f}" for g in self.log_gamma),
            "shift (sd)": (f"{s:+.2f}" for s in self.shift),
            "width": (f"x{w:.2f}" for w in self.width),
        }
        return f"{head}\n{table(self.labels, columns)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers by parameter, fit for JSON; the ranks themselves are left out."""
        names = ("ks", "location", "spread", "log_gamma", "shift", "width")
        return {
            "draws": self.draws,
            "parameters": {
                label: {name: float(getattr(self, name)[i]) for name in names}
                for i, label in enumerate(self.labels)
            },
        }

    def plot(self, ax: Any | None = None) -> Any:
        """Difference of the ranks' ECDF from uniform, with its simultaneous 95% band."""
        from sbi_flows.plots.calibration import rank_ecdf

        band = ecdf_band(len(self.uniform))
        return rank_ecdf(self.uniform, band=band, labels=self.labels, ax=ax)


def sbc(
    key: Key,
    posterior: PosteriorLike,
    simulations: Simulations,
    *,
    draws: int = 1_000,
    progress: bool = False,
) -> SBC:
    """Simulation-based calibration of a posterior on simulations that it has not seen.

    Args:
        key: Random key.
        posterior: The posterior to check; only its `sample` is used.
        simulations: Fresh pairs (theta, x) from the prior and the simulator, 200 or more for any
            power; failed rows are left out and counted.
        draws: Independent draws from each posterior.
        progress: Show a progress bar.

    Returns:
        Ranks, p-values (not corrected for their number) and effect sizes per parameter.

    Raises:
        ValueError: Fewer than 50 simulations that succeeded, fewer than 20 draws, or parameters
            of another width than the posterior's.
        SbiFlowsError: The posterior gave draws that are not finite.

    References:
        Talts et al. 2018, Validating Bayesian Inference Algorithms with Simulation-Based
        Calibration, arXiv:1804.06788, algorithm 1. Modrak et al. 2023, arXiv:2211.02383.
    """
    ranks = draw_pass(key, posterior, simulations, draws=draws, density=False, progress=progress)
    return sbc_of(ranks)


def sbc_of(ranks: Ranks) -> SBC:
    """The tests of SBC on ranks that a draw pass has taken."""
    v = special.ndtri(ranks.uniform)
    location, spread = normal_p_values(ranks.uniform)
    columns, width = ranks.uniform.T, 1.0 / v.std(axis=0, ddof=1)
    beyond = _beyond_all_draws(ranks.uniform, ranks.draws)
    return SBC(
        labels=ranks.labels,
        draws=ranks.draws,
        uniform=ranks.uniform,
        ks=np.array([ks_p_value(u) for u in columns]),
        location=location,
        spread=np.where(beyond & (width > 1), 1.0, spread),
        log_gamma=np.array([log_gamma(u, ranks.draws) for u in columns]),
        shift=-v.mean(axis=0),
        width=width,
        num_failed=ranks.num_failed,
        beyond=beyond,
    )


def _beyond_all_draws(uniform: np.ndarray, draws: int) -> np.ndarray:
    """Whether the two outermost ranks are too frequent, at the level .001; shape (D,)."""
    share = 1.0 / (draws + 1)
    outermost = np.sum((uniform < share) | (uniform > 1.0 - share), axis=0)
    return special.bdtrc(outermost - 1, len(uniform), 2.0 * share) < 1e-3
