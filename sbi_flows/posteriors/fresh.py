"""Fresh simulations that lack entries as the training simulations did.

Internal names: `fresh_simulations`, `hidden_as_in_fit`.
"""

from __future__ import annotations

import jax
import numpy as np

from sbi_flows.core.errors import SbiFlowsWarning
from sbi_flows.core.typing import Key, Simulator
from sbi_flows.core.warn import warn_user
from sbi_flows.posteriors.adapter import PosteriorLike
from sbi_flows.posteriors.base import AbstractPosterior
from sbi_flows.simulations.simulate import simulate
from sbi_flows.simulations.simulations import Simulations

HIDE_TAG = 24
"""Number that is folded into a random key to hide entries."""


def fresh_simulations(
    key: Key, posterior: PosteriorLike, simulator: Simulator, n: int, *, progress: bool
) -> Simulations:
    """Simulate n data sets from the prior, with entries hidden by the pattern of the fit.

    A warning is issued if simulations of the fit lacked entries, but none of these does.
    """
    has_gaps = isinstance(posterior, AbstractPosterior) and posterior.missing.simulates_gaps
    sims = simulate(key, posterior.prior, simulator, n, missing=has_gaps, progress=progress)
    hidden = hidden_as_in_fit(key, posterior, sims)
    leaves = map(np.asarray, jax.tree.leaves(hidden.x))
    if has_gaps and not any(np.isnan(leaf).any() for leaf in leaves):
        warn_user(
            "simulator: expected missing entries, as in the simulations of the fit, got complete "
            "observations; give simulations=simulations.hide(key, pattern) in its place",
            SbiFlowsWarning,
        )
    return hidden


def hidden_as_in_fit(key: Key, posterior: PosteriorLike, sims: Simulations) -> Simulations:
    """Hide entries by the pattern of the fit; return simulations unchanged if there is none."""
    if not isinstance(posterior, AbstractPosterior) or posterior.missing.pattern is None:
        return sims
    return sims.hide(jax.random.fold_in(key, HIDE_TAG), posterior.missing.pattern)
