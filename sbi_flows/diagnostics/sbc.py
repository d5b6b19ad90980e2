"""Simulation-based calibration (SBC): ranks of true parameters among posterior draws.

Public names: `sbc`, `SBC`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

from sbi_flows.core.tables import p_text, table
from sbi_flows.core.typing import Key
from sbi_flows.diagnostics.ranks import Ranks, draw_pass
from sbi_flows.diagnostics.uniformity import ecdf_band, ks_p_value, log_gamma, normal_p_values
from sbi_flows.plots.calibration import rank_ecdf
from sbi_flows.posteriors.adapter import PosteriorLike
from sbi_flows.posteriors.reuse import warn_of_reuse
from sbi_flows.simulations.simulations import Simulations

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True, repr=False)
class SBC:
    """Ranks of the true parameters of N data sets, and tests of their uniformity.

    Attributes:
        labels: Names of the D parameters.
        draws: Number of draws L from each posterior.
        uniform: Continuous ranks in (0, 1), shape (N, D). Ties are broken at random and each
            integer rank is placed at random within its cell, so that tests for continuous
            variables are exact.
        ks: P-values of the Kolmogorov-Smirnov test, shape (D,).
        location: P-values of the test for a shift (`normal_p_values`), shape (D,).
        spread: P-values of the test for a wrong width (`normal_p_values`), shape (D,).
        log_gamma: Logarithm of the rank statistic gamma (`uniformity.log_gamma`) divided by its 5%
            null quantile, shape (D,); a value below 0 rejects at 5%.
        shift: Posterior mean minus true mean, in posterior standard deviations, shape (D,);
            positive if the posterior lies too high.
        width: Posterior width divided by the correct width, shape (D,); below 1 if the posterior
            is too narrow.
        num_failed: Number of failed simulations that were left out.
        beyond: True if significantly many truths lie outside the range of all draws, shape (D,).
            Ranks do not measure how far outside, so `shift` and `width` are then lower bounds of
            the error. If the posterior then appears too wide, its width is not tested (`spread` is
            1).
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
        """Return the table of `summary`."""
        return self.summary()

    def summary(self) -> str:
        """Return a table of p-values and effect sizes, one line per parameter."""
        title = f"SBC: {len(self.uniform)} data sets x {self.draws} draws"
        columns = {
            "KS p": map(p_text, self.ks),
            "shift p": map(p_text, self.location),
            "width p": map(p_text, self.spread),
            "log-gamma": (f"{g:.1f}" for g in self.log_gamma),
            "shift (sd)": (f"{s:+.2f}" for s in self.shift),
            "width": (f"x{w:.2f}" for w in self.width),
        }
        return f"{title}\n{table(self.labels, columns)}"

    def to_dict(self) -> dict[str, Any]:
        """Return p-values and effect sizes by parameter as JSON data, without the ranks."""
        names = ("ks", "location", "spread", "log_gamma", "shift", "width")
        return {
            "draws": self.draws,
            "parameters": {
                label: {name: float(getattr(self, name)[i]) for name in names}
                for i, label in enumerate(self.labels)
            },
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the ECDF of the ranks minus the uniform distribution, with the 95% band."""
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
    """Run simulation-based calibration on simulations that the posterior was not trained on.

    Args:
        key: Random key.
        posterior: The posterior to check; only its method `sample` is used.
        simulations: Pairs (theta, x) from the prior and the simulator, at least 50, better 200 or
            more; failed rows are left out and counted.
        draws: Independent draws from each posterior, at least 20.
        progress: Show a progress bar.

    Returns:
        Ranks, p-values (not corrected for multiple tests) and effect sizes per parameter.

    Raises:
        ValueError: Fewer than 50 simulations succeeded, there are fewer than 20 draws, or the
            number of parameters differs from the posterior's.
        SbiFlowsError: The posterior returned draws that are not finite.

    References:
        Talts et al. 2018, Validating Bayesian Inference Algorithms with Simulation-Based
        Calibration, arXiv:1804.06788, algorithm 1.
        Modrak et al. 2023, Simulation-Based Calibration Checking for Bayesian Computation,
        arXiv:2211.02383.
    """
    warn_of_reuse(posterior, simulations, "simulations")
    ranks = draw_pass(key, posterior, simulations, draws=draws, density=False, progress=progress)
    return sbc_of(ranks)


def sbc_of(ranks: Ranks) -> SBC:
    """Run the tests of SBC on the result of `draw_pass`."""
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
    """Test at level 0.001 whether the lowest and highest rank are too frequent, shape (D,)."""
    share = 1.0 / (draws + 1)
    outermost = np.sum((uniform < share) | (uniform > 1.0 - share), axis=0)
    return special.bdtrc(outermost - 1, len(uniform), 2.0 * share) < 1e-3
