"""Stray draws that determine an sd are reported once; heavy tails and modes are not."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from sbi_flows.core.errors import SbiFlowsWarning
from sbi_flows.posteriors.strays import strays_of, warn_of_strays
from sbi_flows.prior.prior import as_prior

PRIOR = as_prior({"a": dist.Normal(0.0, 1.0), "b": dist.Normal(0.0, 1.0)})


class Fit:
    """Something that draws come from."""


def draws_with(rng, strays, at=3.0):
    """Return 10,000 narrow draws of two parameters; some of `b` lie far outside."""
    draws = 0.02 * rng.normal(size=(10_000, 2))
    draws[:strays, 1] = at * rng.choice([-1.0, 1.0], size=strays)
    return jnp.asarray(draws)


def test_strays_are_reported_once_for_each_posterior():
    fit, draws = Fit(), draws_with(np.random.default_rng(0), 20)
    text = r"0.2% of the draws of b lie more than 6 robust .* 6.\d times as large"
    with pytest.warns(SbiFlowsWarning, match=text):
        warn_of_strays(fit, PRIOR, draws)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_strays(fit, PRIOR, draws)
    with pytest.warns(SbiFlowsWarning, match="of the draws of b"):
        warn_of_strays(Fit(), PRIOR, draws)


@pytest.mark.parametrize(
    "draws",
    [
        jax.random.normal(jax.random.key(0), (10_000, 2)),
        draws_with(np.random.default_rng(1), 0),
        draws_with(np.random.default_rng(2), 1_000),  # a second mode
        draws_with(np.random.default_rng(3), 20)[-1_000:],  # too few draws
        jnp.zeros((10_000, 2)),
    ],
    ids=["normal", "narrow", "two modes", "few", "constant"],
)
def test_other_draws_are_not_reported(draws):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_strays(Fit(), PRIOR, draws)


@pytest.mark.parametrize("shape", ["laplace", "exponential", "t4", "lognormal", "inverse gamma"])
def test_heavy_tails_are_not_strays(shape):
    rng = np.random.default_rng(5)
    draws = {
        "laplace": lambda: rng.laplace(size=10_000),
        "exponential": lambda: rng.exponential(size=10_000),
        "t4": lambda: rng.standard_t(4, size=10_000),
        "lognormal": lambda: np.exp(0.8 * rng.normal(size=10_000)),
        "inverse gamma": lambda: 1.0 / rng.gamma(4.0, size=10_000),
    }[shape]()
    assert strays_of(draws[:, None])[1] == 0.0


def test_the_factor_is_that_of_the_standard_deviation():
    draws = np.asarray(draws_with(np.random.default_rng(4), 20), float)
    ratio, fraction = strays_of(draws)
    assert fraction == pytest.approx([0.0, 0.002])
    assert ratio[1] == pytest.approx(draws[:, 1].std() / 0.02, rel=0.05)
