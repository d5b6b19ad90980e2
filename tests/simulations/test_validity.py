"""P(valid | theta), and posteriors with known answers, with and without an effect of failures."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.special import expit

import sbi_flows as sf
from tests import cases

PRIOR = dist.Normal(0.0, 1.0).expand([1])
NOISE, X, N = 0.7, 0.8, 4_000
KEY = jax.random.key(0)

# of theta ~ N(0, 1) and x ~ N(theta, NOISE^2), the probability to fail
FAILING = {
    "parameters": lambda theta, x: expit(2.0 * theta),
    "outcome": lambda theta, x: expit(2.0 * x),
    "nothing": lambda theta, x: np.full(len(theta), 0.3),
}
EXACT = X / (1.0 + NOISE**2), NOISE / (1.0 + NOISE**2) ** 0.5
"""Posterior mean and standard deviation at x = X for a simulator without failures."""


def joint(kind, n, seed):
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=n)
    x = theta + NOISE * rng.normal(size=n)
    return theta, x, rng.uniform(size=n) >= FAILING[kind](theta, x)


def given_valid():
    """Compute mean and standard deviation given x = X and a valid simulation, on a grid."""
    grid = np.linspace(-6.0, 6.0, 10_001)
    density = np.exp(-0.5 * grid**2 - 0.5 * ((X - grid) / NOISE) ** 2) * expit(-2.0 * grid)
    density /= density.sum()
    mean = grid @ density
    return mean, ((grid - mean) ** 2 @ density) ** 0.5


@pytest.fixture(scope="module", params=FAILING)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def validity(kind):
    theta, x, valid = joint(kind, N, 0)
    sims = sf.Simulations(theta[:, None], x, valid=valid)
    return sf.fit_validity(KEY, PRIOR, sims)


@pytest.fixture(scope="module")
def learned(kind):
    """Return parameters of valid simulations with outcomes close to X."""
    theta, x, valid = joint(kind, 2_000_000, 1)
    return theta[valid & (np.abs(x - X) < 0.02), None].astype(np.float32)


def moments(draws):
    return np.mean(draws), np.std(draws)


def test_probabilities_are_learned_and_judged(kind, validity):
    grid = np.linspace(-2.0, 2.0, 9)
    found = np.asarray(validity.probability(grid[:, None]))
    noise = np.random.default_rng(3).normal(size=(2_000, 1))
    expected = 1.0 - FAILING[kind](
        np.tile(grid, (2_000, 1)).ravel(), (grid + NOISE * noise).ravel()
    )
    np.testing.assert_allclose(found, expected.reshape(2_000, 9).mean(axis=0), atol=0.05)
    gain, error = validity.gain
    assert gain == pytest.approx(validity.constant_loss - validity.held_out_loss)
    assert validity.calibration_p > 0.01
    blind = "no sign that failures depend on the parameters"
    assert (gain < 2 * error) == (blind in repr(validity)) == (kind == "nothing")
    assert repr(validity).startswith("P(valid | theta) of 4,000 simulations, of which ")


def test_draws_are_corrected_where_that_is_right(kind, validity, learned):
    key = jax.random.key(1)
    found = validity.corrected(key, learned, 20_000)
    assert found.theta.shape == (20_000, 1)
    assert found.weights.shape == (len(learned),)
    assert float(found.weights.sum()) == pytest.approx(1.0, abs=1e-4)
    if kind == "parameters":
        assert moments(learned) == pytest.approx(given_valid(), abs=0.03)
        assert given_valid()[0] < EXACT[0] - 0.2
        assert moments(found.theta) == pytest.approx(EXACT, abs=0.03)
        assert 0.3 < found.effective / len(learned) < 0.9
        assert len(validity.corrected(key, learned).theta) == int(found.effective)
    else:
        # the posterior is the right one as it is
        assert moments(learned) == pytest.approx(EXACT, abs=0.03)
    if kind == "outcome":
        assert np.mean(found.theta) > EXACT[0] + 0.15
    if kind == "nothing":
        assert moments(found.theta) == pytest.approx(EXACT, abs=0.03)
        assert found.effective > 0.99 * len(learned)


def test_weights_that_are_too_uneven_are_refused(kind, validity):
    draws = np.full((1_000, 1), -2.0)
    draws[0] = 4.5
    if kind == "nothing":
        assert validity.corrected(KEY, draws).effective > 900
        return
    with pytest.raises(sf.WeightsUneven, match=r"1000 of them are worth \d+ with weights 1 / P"):
        validity.corrected(KEY, draws)


@pytest.mark.slow
def test_two_parameters_in_double_precision():
    """Failures in two opposite corners, which logistic regression cannot represent."""
    with jax.enable_x64(True):
        prior = {"a": dist.Uniform(-1.0, 1.0), "b": dist.LogNormal(0.0, 1.0)}
        rng = np.random.default_rng(0)
        a, log_b = rng.uniform(-1.0, 1.0, 4_000), rng.normal(size=4_000)
        corner = (a > 0.2) == (log_b > 0.3)
        theta = np.stack([a, np.exp(log_b)], axis=1)
        valid = rng.uniform(size=4_000) > np.where(corner, 0.9, 0.1)
        found = sf.fit_validity(KEY, prior, sf.Simulations(theta, a, valid=valid))
        at = np.exp([[[0.0, -1.0], [0.0, 1.5]]]) * np.array([[[0.7, 1.0], [-0.7, 1.0]]])
        p = found.probability(at)
        assert p.shape == (1, 2) and p.dtype == jnp.float64
        np.testing.assert_allclose(p, [[0.9, 0.9]], atol=0.1)
        assert found.probability(np.array([-0.7, 0.3])) == pytest.approx(0.1, abs=0.1)
        assert found.gain[0] > 0.2 and found.calibration_p > 0.01


def test_what_cannot_be_learned_from_is_refused():
    theta = np.linspace(-0.9, 0.9, 100)[:, None]
    few = sf.Simulations(theta, theta, valid=np.arange(100) > 18)
    with pytest.raises(ValueError, match="at least 20 that failed and 20 that did not, got 19 and"):
        sf.fit_validity(KEY, PRIOR, few)
    narrow = dist.Uniform(-0.5, 0.5).expand([1])
    with pytest.raises(ValueError, match="simulations: expected parameters in the prior's support"):
        sf.fit_validity(KEY, narrow, few)


def test_draws_that_do_not_fit_are_refused(validity):
    with pytest.raises(ValueError, match=r"theta: expected shape \(\*, 1\) for"):
        validity.probability(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="n: expected a whole number of at least 1, got 0"):
        validity.corrected(KEY, np.zeros((3, 1)), 0)
    with pytest.raises(ValueError, match="theta: expected a numeric array"):
        validity.corrected(KEY, np.zeros(3))


@pytest.mark.slow
def test_a_fitted_posterior_is_corrected():
    """From a JAX simulator that fails at some parameters to draws of the corrected posterior."""

    def failing(key, theta):
        noise_key, fail_key = jax.random.split(key)
        x = theta + NOISE * jax.random.normal(noise_key, (1,))
        return jnp.where(jax.random.uniform(fail_key) < jax.nn.sigmoid(2.0 * theta), jnp.nan, x)

    with pytest.warns(sf.SbiFlowsWarning, match="simulations failed"):
        sims = sf.simulate(KEY, PRIOR, failing, 8_000, progress=False)
    npe = sf.NPE(PRIOR, cases.DENSITIES["MAF"], training=sf.Training(max_epochs=20), members=1)
    posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
    draws = posterior.sample(jax.random.key(2), np.array([X], np.float32), 10_000)
    assert moments(draws) == pytest.approx(given_valid(), abs=0.06)
    found = sf.fit_validity(jax.random.key(3), PRIOR, sims).corrected(jax.random.key(4), draws)
    assert moments(found.theta) == pytest.approx(EXACT, abs=0.06)
