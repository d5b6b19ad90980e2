"""TARP: coverage of regions around reference points, a test of the joint posterior.

Public names: `tarp`, `TARP`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array

from sbi_flows.core.tables import p_text
from sbi_flows.core.typing import Key
from sbi_flows.diagnostics.ranks import Ranks, draw_pass
from sbi_flows.diagnostics.references import References, crude_posterior, prior_scale
from sbi_flows.diagnostics.uniformity import ecdf_band, ks_p_value
from sbi_flows.plots.calibration import coverage_curve
from sbi_flows.posteriors.adapter import PosteriorLike
from sbi_flows.posteriors.passes import usable
from sbi_flows.posteriors.reuse import warn_of_reuse
from sbi_flows.simulations.simulations import Simulations

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True, repr=False)
class TARP:
    """Share of draws that are closer to a reference point than the truth is, for N data sets.

    Attributes:
        fractions: Continuous shares f in (0, 1), shape (N,).
        levels: Credibility levels alpha of the curve, shape (K,).
        expected: Expected coverage probability at each level, which is the ECDF of f, shape (K,).
        lower: Lower edge of the simultaneous 95% band at each level, shape (K,).
        upper: Upper edge of the band at each level, shape (K,).
        ks: P-value of the Kolmogorov-Smirnov test of f against U(0, 1). The test uses f itself; a
            test that treats the curve and its levels as two samples has no power.
        atc: Area between curve and diagonal above level 0.5: about 0 if calibrated, positive if
            the posterior is over-dispersed, negative if it is under-dispersed.
        num_failed: Number of failed simulations that were left out.
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
        """Return the line of `summary`."""
        return self.summary()

    def summary(self) -> str:
        """Return one line with the p-value and the area to the curve (ATC)."""
        return f"TARP: {len(self.fractions)} data sets, KS p {p_text(self.ks)}, ATC {self.atc:+.3f}"

    def to_dict(self) -> dict[str, Any]:
        """Return p-value, area and curve as JSON data, without the fractions."""
        return {
            "ks": self.ks,
            "atc": self.atc,
            "levels": self.levels.tolist(),
            "expected": self.expected.tolist(),
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot expected coverage against credibility level, with the simultaneous 95% band."""
        curve = {"TARP": self.expected}
        return coverage_curve(self.levels, curve, band=(self.lower, self.upper), ax=ax)


def tarp(
    key: Key,
    posterior: PosteriorLike,
    simulations: Simulations,
    *,
    references: Array | np.ndarray | None = None,
    draws: int = 1_000,
    progress: bool = False,
) -> TARP:
    """Run tests of accuracy with random points (TARP), a check of the joint posterior.

    Distances are Euclidean, in units of each parameter's prior width. By default, a reference point
    is a draw from a crude posterior that is fitted to the simulations alone (`crude_posterior`).
    Reference points depend on x, because otherwise a posterior equal to the prior would pass. They
    are random, because a single point might not reveal an error.

    Args:
        key: Random key.
        posterior: The posterior to check; only its method `sample` is used.
        simulations: Pairs (theta, x) from the prior and the simulator that the posterior was not
            trained on, at least 50; failed rows are left out and counted.
        references: Reference points, shape (N, D), one per valid row, in the parameters' units.
            They may depend on x and on random numbers, but not on the truth of their row.
        draws: Independent draws from each posterior, at least 20.
        progress: Show a progress bar.

    Returns:
        The fractions, the coverage curve, the p-value and the area to the curve.

    Raises:
        ValueError: Fewer than 50 simulations succeeded, there are fewer than 20 draws, the number
            of parameters differs from the posterior's, or references have another shape.
        SbiFlowsError: The posterior gave draws that are not finite.

    References:
        Lemos et al. 2023, Sampling-Based Accuracy Testing of Posterior Estimators for General
        Inference, arXiv:2302.03026, algorithm 2 and theorem 3.
    """
    valid = usable(posterior, simulations, draws)
    warn_of_reuse(posterior, simulations, "simulations")
    reference_key, draw_key = jax.random.split(key)
    points = crude_posterior(reference_key, valid) if references is None else references
    ranks = draw_pass(
        draw_key,
        posterior,
        simulations,
        draws=draws,
        references=References(np.asarray(points), prior_scale(valid.theta)),
        density=False,
        progress=progress,
    )
    return tarp_of(ranks)


def tarp_of(ranks: Ranks) -> TARP:
    """Run the test of TARP on the distance ranks from `draw_pass`."""
    if ranks.distance is None:
        raise ValueError("ranks: expected a draw pass with reference points, got one without")
    return tarp_from_fractions(ranks.distance, num_failed=ranks.num_failed)


def tarp_from_fractions(fractions: Array | np.ndarray, *, num_failed: int = 0) -> TARP:
    """Run the test of TARP on fractions f in (0, 1), shape (N,)."""
    fractions = np.asarray(fractions, np.float64)
    levels, lower, upper = ecdf_band(len(fractions))
    return TARP(
        fractions=fractions,
        levels=levels,
        expected=np.mean(fractions[:, None] <= levels[None], axis=0),
        lower=lower,
        upper=upper,
        ks=ks_p_value(fractions),
        # The exact integral of ECDF minus diagonal from 0.5 to 1.
        atc=float(np.mean(1.0 - np.maximum(fractions, 0.5)) - 0.375),
        num_failed=num_failed,
    )
