"""The linear start: exact for linear-Gaussian problems, no worse than the prior for others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sbi_flows.densities.start import fit_linear_start
from sbi_flows.prior.maps import HALF_WIDTH

ROWS, HELD_OUT, FRESH = 4000, 400, 20_000
MIXING = np.array([[1.0, 0.6], [0.0, 1.0], [0.5, -0.5]])
NOISE = np.array([0.5, 0.8, 1.0])

fit = jax.jit(fit_linear_start, static_argnums=4)


def started(y, c, bounded):
    """Fit a start to all rows but the last FRESH, and compute log densities of these."""
    y, c = jnp.asarray(y, jnp.float32), jnp.asarray(c, jnp.float32)
    rows = len(y) - FRESH
    order = jnp.arange(rows)
    held_out = rows // 10
    start = fit(y[:rows], c[:rows], order[held_out:], order[:held_out], bounded)
    log_prob = start.from_predictor(c[rows:] @ start.weight, bounded).log_prob(y[rows:])
    return start, np.asarray(log_prob)


def linear_gaussian(rng, y):
    return y @ MIXING.T + NOISE * rng.normal(size=(len(y), 3))


def test_a_linear_gaussian_posterior_is_exact():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(ROWS + FRESH, 2))
    c = linear_gaussian(rng, y)
    _, log_prob = started(y, c, (False, False))
    covariance = np.linalg.inv(np.eye(2) + MIXING.T @ np.diag(NOISE**-2) @ MIXING)
    means = c[ROWS:] / NOISE**2 @ MIXING @ covariance
    exact = stats.multivariate_normal(cov=covariance).logpdf(y[ROWS:] - means)
    assert -0.01 < np.mean(exact - log_prob) < 0.03
    # for each row, and not only on average
    assert np.std(exact - log_prob) < 0.2


def test_a_long_observation_is_read_through_its_leading_directions():
    """An image of 40 x 40 pixels: a linear function of two parameters plus noise in every pixel."""
    rng = np.random.default_rng(5)
    y = rng.normal(size=(1000 + 2000, 2))
    c = y @ rng.normal(size=(2, 1600)) + 10.0 * rng.normal(size=(len(y), 1600))
    y, c = jnp.asarray(y, jnp.float32), jnp.asarray(c, jnp.float32)
    order = jnp.arange(1000)
    start = fit(y[:1000], c[:1000], order[100:], order[:100], (False, False))
    assert start.weight.shape == (1600, 2)
    log_prob = start.from_predictor(c[1000:] @ start.weight, (False, False)).log_prob(y[1000:])
    # the posterior sd of either number is about 10 / sqrt(1600)
    assert np.mean(log_prob) > stats.norm.logpdf(y[1000:]).sum(axis=1).mean() + 1.0


@pytest.mark.parametrize("noise", [0.1, 0.5, 2.0])
def test_a_truncated_normal_posterior_is_exact(noise):
    """A box prior and Gaussian noise: posteriors inside the box and cut off by its faces."""
    rng = np.random.default_rng(1)
    y = rng.uniform(-HALF_WIDTH, HALF_WIDTH, size=(ROWS + FRESH, 2))
    c = np.concatenate([y + noise * rng.normal(size=y.shape), rng.normal(size=(len(y), 1))], axis=1)
    _, log_prob = started(y, c, (True, True))
    mean = c[ROWS:, :2]
    low, high = (-HALF_WIDTH - mean) / noise, (HALF_WIDTH - mean) / noise
    exact = stats.truncnorm.logpdf(y[ROWS:], low, high, mean, noise).sum(axis=1)
    assert -0.01 < np.mean(exact - log_prob) < 0.05


def test_without_information_the_start_is_the_prior():
    """Too few rows for so many features: any regression would overfit."""
    rng = np.random.default_rng(2)
    for bounded in ((False, False), (True, True)):
        y = rng.normal(size=(400 + FRESH, 2))
        if bounded[0]:
            y = rng.uniform(-HALF_WIDTH, HALF_WIDTH, size=y.shape)
        start, log_prob = started(y, rng.normal(size=(len(y), 60)), bounded)
        np.testing.assert_array_equal(start.weight, 0.0)
        prior = -np.log(2 * HALF_WIDTH) if bounded[0] else np.mean(stats.norm.logpdf(y))
        assert np.mean(log_prob) > 2 * prior - 0.03


def test_a_mixture_of_bounded_and_unbounded_entries():
    rng = np.random.default_rng(3)
    y = rng.uniform(-HALF_WIDTH, HALF_WIDTH, size=(ROWS + FRESH, 2))
    c = linear_gaussian(rng, y)
    _, both = started(y, c, (True, True))
    _, first = started(y, c, (True, False))
    _, neither = started(y, c, (False, False))
    assert np.mean(both) > np.mean(first) + 0.01 > np.mean(neither) + 0.02


FEATURES = {
    "constant": lambda rng, c: np.zeros_like(c),
    "repeated": lambda rng, c: np.repeat(c[:, :1], 3, axis=1),
    "of very different sizes": lambda rng, c: c * np.array([1e4, 1.0, 1e-4]),
    "more than rows": lambda rng, c: rng.normal(size=(len(c), 60)),
}


@pytest.mark.parametrize("name", FEATURES)
def test_awkward_features_give_a_finite_start(name):
    rng = np.random.default_rng(4)
    rows = 40 if name == "more than rows" else 400
    y = rng.normal(size=(rows + FRESH, 2))
    c = FEATURES[name](rng, linear_gaussian(rng, y))
    start, log_prob = started(y, c, (False, False))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(start))
    assert np.mean(log_prob) > 2 * np.mean(stats.norm.logpdf(y)) - 0.2


def test_a_parameter_that_follows_another_exactly_stays_finite():
    rng = np.random.default_rng(5)
    y = np.repeat(rng.normal(size=(400 + FRESH, 1)), 2, axis=1)
    start, log_prob = started(y, linear_gaussian(rng, y), (False, False))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((start, log_prob)))
