"""The tempered reference on posteriors with a closed form, and what it does when it cannot tell."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

from simulators.adapters import tempering
from simulators.adapters.task import ReferenceFailed
from simulators.adapters.tempering import TemperedReference

pytestmark = pytest.mark.promotes


def ridge(x):
    """A thin curved ridge: the data measure b - a^2 well, and a badly."""
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    b = numpyro.sample("b", dist.Normal(0.0, 3.0))
    numpyro.sample("x", dist.Normal(b - a**2, 0.02), obs=x)


def two_sides(x):
    """Two equal modes, at -1 and 1 in the unit of the prior."""
    a = numpyro.sample("a", dist.Uniform(-3.0, 3.0))
    numpyro.sample("x", dist.Normal(jnp.abs(a), 0.05), obs=x)


def test_a_thin_curved_ridge():
    draws = np.asarray(TemperedReference(ridge, ("b", "a"))(jax.random.key(0), 0.5, 4096), float)
    b, a = draws.T
    np.testing.assert_allclose([np.mean(b - a**2), np.std(b - a**2)], [0.5, 0.02], atol=3e-3)
    grid = np.linspace(-4, 4, 4001)
    density = np.exp(-0.5 * grid**2 - (grid**2 + 0.5) ** 2 / 18)
    cumulative = np.cumsum(density) / density.sum()
    assert stats.kstest(np.interp(a, grid, cumulative), "uniform").statistic < 0.06


def test_both_modes_have_their_share():
    draws = np.asarray(TemperedReference(two_sides, ("a",))(jax.random.key(0), 1.0, 4096))[:, 0]
    assert 0.44 < np.mean(draws > 0) < 0.56
    np.testing.assert_allclose(np.std(np.abs(draws)), 0.05, rtol=0.1)


def test_populations_that_differ_are_refused(monkeypatch):
    for name in ("MOVES", "LAST_MOVES"):
        monkeypatch.setattr(tempering, name, 0)
    monkeypatch.setattr(tempering, "SIZE", 32)
    tempering._populations.clear_cache()
    with pytest.raises(ReferenceFailed, match="R-hat"):
        TemperedReference(ridge, ("b", "a"))(jax.random.key(0), 5.0, 100)
    tempering._populations.clear_cache()
