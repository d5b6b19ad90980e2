"""Eight schools: a hierarchical model of coaching effects in eight schools, with real data.

Public names: `eight_schools`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array

from simulators.adapters.numpyro_model import NumpyroTask, from_numpyro

EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
"""Estimated effect of coaching on test scores in each school, in points."""

ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
"""Standard errors of the estimated effects, in points."""

CITATION = (
    "Rubin 1981, Estimation in Parallel Randomized Experiments, J. Educ. Stat. 6; as in Gelman et "
    "al., Bayesian Data Analysis, section 5.5"
)


@cache
def eight_schools() -> NumpyroTask:
    """Make the eight schools task: a hierarchical normal model with known standard errors.

    The priors are mean ~ N(0, 5), spread ~ HalfNormal(10) and standardised_i ~ N(0, 1). The effect
    in school i is effect_i = mean + spread * standardised_i, and its estimate is
    y_i ~ N(effect_i, error_i). The second argument of N is the standard deviation.

    Returns:
        The task: theta of shape (10,) (`mean`, `spread` and eight entries of `standardised`), x of
        shape (8,). The reference sampler is NUTS.

    References:
        Rubin 1981, J. Educ. Stat. 6:377.

    Example:
        >>> eight_schools().labels[:3]
        ('mean', 'spread', 'standardised[0]')
    """
    data = EFFECTS.astype(np.float32)
    return from_numpyro(_model, ["y"], data=data, name="eight_schools", citation=CITATION)


def _model(y: Array | None = None) -> None:
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    spread = numpyro.sample("spread", dist.HalfNormal(10.0))
    with numpyro.plate("school", len(EFFECTS)):
        standardised = numpyro.sample("standardised", dist.Normal(0.0, 1.0))
        effect = numpyro.deterministic("effect", mean + spread * standardised)
        numpyro.sample("y", dist.Normal(effect, ERRORS), obs=y)
