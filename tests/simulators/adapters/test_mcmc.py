"""NUTS for reference posteriors, on a conjugate posterior."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from simulators import ReferenceFailed
from simulators.adapters import mcmc

pytestmark = pytest.mark.promotes


def gaussian(x):
    """Two means with posterior standard deviations .45 and .1."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("x", dist.Normal(mean, jnp.array([0.5, 0.1])).to_event(1), obs=x)


@pytest.mark.slow
def test_a_conjugate_posterior_is_recovered():
    x = jnp.array([1.0, -2.0])
    sampler = mcmc.NutsReference(gaussian, ("mean",))
    rows, found = sampler.diagnosed(jax.random.key(0), x, 3000)
    rows = np.asarray(rows)
    assert found["rhat"] < 1.01 and found["diverged"] == 0.0
    assert 1000 < found["ess"] < 20_000
    variance = 1 / (1 + 1 / np.array([0.25, 0.01]))
    np.testing.assert_allclose(
        rows.mean(axis=0), np.asarray(x) * variance / [0.25, 0.01], atol=0.08 * variance[0] ** 0.5
    )
    np.testing.assert_allclose(rows.std(axis=0), variance**0.5, rtol=0.08)


def fake_run(draws: np.ndarray, diverging: float) -> SimpleNamespace:
    flags = np.arange(draws.size) < diverging * draws.size
    return SimpleNamespace(
        get_samples=lambda group_by_chain: {"alpha": draws},
        get_extra_fields=lambda: {"diverging": flags},
    )


def converged(run):
    mcmc._require_converged(mcmc._diagnostics(run))


def test_chains_that_disagree_are_refused():
    draws = np.random.default_rng(0).normal(size=(4, 500))
    converged(fake_run(draws, 0.0))
    with pytest.raises(ReferenceFailed, match=r"got R-hat 1\.\d+ and 0.0%"):
        converged(fake_run(draws + np.arange(4)[:, None], 0.0))
    with pytest.raises(ReferenceFailed, match=r"at most 1% divergences, got R-hat .* and 5.0%"):
        converged(fake_run(draws, 0.05))
