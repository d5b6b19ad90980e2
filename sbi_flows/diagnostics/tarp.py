"""TARP: coverage of regions around reference points, which tests the joint posterior.

Public names: `tarp`, `TARP`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from sbi_flows.core.tables import p_text
from sbi_flows.core.typing import Key
from sbi_flows.diagnostics.ranks import Ranks, draw_pass
from sbi_flows.diagnostics.references import crude_posterior, prior_scale
from sbi_flows.diagnostics.uniformity import ecdf_band, ks_p_value
from sbi_flows.posteriors.base import PosteriorLike
from sbi_flows.posteriors.passes import usable
from sbi_flows.simulations.simulations import Simulations


@dataclasses.dataclass(frozen=True, repr=False)
class TARP:
    """Shares of draws nearer to a reference point than the truth, and the test of them.

    Attributes:
        fractions: Continuous shares f in (0, 1), shape (N,).
        levels: Credibility levels alpha of the curve, shape (K,).
        expected: Expected coverage probability at each level, the ECDF of f, shape (K,).
        lower: Lower edge of the simultaneous 95% band, shape (K,).
        upper: Upper edge of it, shape (K,).
        ks: P-value of the Kolmogorov-Smirnov test of f against U(0, 1). It is taken on f itself:
            comparing the curve with its levels as if they were samples has no power.
        atc: Area between curve and diagonal above level .5; about 0 when calibrated, positive when
            over-dispersed, negative when under-dispersed.
        num_failed: Simulations left out because they failed.
    """

    fractions: np.ndarray
    levels: np.ndarray
    expected: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    ks: float
    atc: float
    num_failed: int

    def __repr__(self) -> str:
        """The line of `summary`."""
        return self.summary()

    def summary(self) -> str:
        """One line: the p-value and the area to the curve."""
        return f"TARP: {len(self.fractions)} data sets, KS p {p_text(self.ks)}, ATC {self.atc:+.3f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, fit for JSON."""
        return {
            "ks": self.ks,
            "atc": self.atc,
            "levels": self.levels.tolist(),
            "expected": self.expected.tolist(),
        }

    def plot(self, ax: Any | None = None) -> Any:
        """Expected coverage against credibility level, with the simultaneous band."""
        from sbi_flows.plots.calibration import coverage_curve

        curve = {"TARP": self.expected}
        return coverage_curve(self.levels, curve, band=(self.lower, self.upper), ax=ax)


def tarp(
    key: Key,
    posterior: PosteriorLike,
    simulations: Simulations,
    *,
    references: Any | None = None,
    draws: int = 1_000,
    progress: bool = False,
) -> TARP:
    """Test of accuracy with random points (TARP): a check of the joint posterior.

    Distances are Euclidean in units of each parameter's prior width. By default a reference point
    is a draw from a crude posterior fitted to the simulations alone (`crude_posterior`). It
    depends on x, without which a posterior equal to the prior would pass, and is random, without
    which an error could hide behind one point of view.

    Args:
        key: Random key.
        posterior: The posterior to check; only its `sample` is used.
        simulations: Fresh pairs (theta, x) from the prior and the simulator; failed rows are left
            out and counted.
        references: Points of one's own, shape (N, D) over the rows that succeeded; they may depend
            on x and on chance but not on the truth of their row.
        draws: Independent draws from each posterior.
        progress: Show a progress bar.

    Returns:
        The fractions, the curve, the p-value and the area to the curve.

    Raises:
        ValueError: Fewer than 50 simulations that succeeded, fewer than 20 draws, or references
            of another shape.
        SbiFlowsError: The posterior gave draws that are not finite.

    References:
        Lemos et al. 2023, Sampling-Based Accuracy Testing of Posterior Estimators for General
        Inference, arXiv:2302.03026, algorithm 2 and theorem 3.
    """
    valid = usable(posterior, simulations, draws)
    reference_key, draw_key = jax.random.split(key)
    if references is None:
        references = crude_posterior(reference_key, valid)
    ranks = draw_pass(
        draw_key,
        posterior,
        simulations,
        draws=draws,
        references=references,
        scale=prior_scale(valid.theta),
        density=False,
        progress=progress,
    )
    return tarp_of(ranks)


def tarp_of(ranks: Ranks) -> TARP:
    """The test of TARP on fractions that a draw pass has taken."""
    if ranks.distance is None:
        raise ValueError("ranks: expected a draw pass with reference points, got one without")
    return tarp_from_fractions(ranks.distance, num_failed=ranks.num_failed)


def tarp_from_fractions(fractions: Any, *, num_failed: int = 0) -> TARP:
    """The test of TARP on fractions f (N,) in (0, 1)."""
    fractions = np.asarray(fractions, np.float64)
    levels, lower, upper = ecdf_band(len(fractions))
    return TARP(
        fractions=fractions,
        levels=levels,
        expected=np.mean(fractions[:, None] <= levels[None], axis=0),
        lower=lower,
        upper=upper,
        ks=ks_p_value(fractions),
        # the integral of the ECDF from .5 to 1 less that of the diagonal, without a grid
        atc=float(np.mean(1.0 - np.maximum(fractions, 0.5)) - 0.375),
        num_failed=num_failed,
    )
