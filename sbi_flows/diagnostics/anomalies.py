"""Anomalies: observations in a batch that are not typical of the training simulations.

Public names: `anomalies`.
"""

from __future__ import annotations

from sbi_flows.core.checks import require_object
from sbi_flows.core.typing import Obs
from sbi_flows.observations.misspecification import Anomalies
from sbi_flows.posteriors.base import AbstractPosterior


def anomalies(posterior: AbstractPosterior, xs: Obs) -> Anomalies:
    """Test which observations of a batch are not typical of the training simulations.

    This is `posterior.misspecification(xs)` with a check that xs is a batch.

    Args:
        posterior: The posterior.
        xs: A batch of observations (B, *event).

    Returns:
        P-values and scores; printing them shows the number of flagged observations.

    Raises:
        ValueError: xs is a single observation or has another shape than a training observation, or
            the posterior has no record of its training simulations.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0.0, 1.0).expand([2])
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (2,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 1000, progress=False)
        >>> npe = sf.NPE(prior, sf.MAF(), training=sf.Training(max_epochs=1), members=1)
        >>> posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
        >>> sf.anomalies(posterior, jax.numpy.array([[0.3, 0.5], [0.3, 6.0]])).flagged()
        array([False,  True])
    """
    require_object("posterior", posterior, AbstractPosterior, "a posterior of sbi_flows")
    if posterior.is_single(xs):
        raise ValueError("xs: expected a batch, got one observation; see misspecification")
    result = posterior.misspecification(xs)
    assert isinstance(result, Anomalies)
    return result
