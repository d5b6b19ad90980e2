"""The least-squares summary recovers the parameters and is finite for every simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sbi_flows as sf
from simulators import lynx_hare
from simulators.gallery.lynx_hare_fit import least_squares_fit, with_fit

COLUMNS = [0, 1, 2, 3, 6, 7]  # alpha, beta, gamma, delta and z0 of theta

fit_all = jax.jit(jax.vmap(least_squares_fit))


@pytest.fixture(scope="module")
def simulations():
    task = lynx_hare()
    sims = sf.simulate(jax.random.key(0), task.prior, task.simulator, 512, progress=False)
    return sims.only_valid()


def test_parameters_and_noise_of_simulations_are_recovered(simulations):
    fit = np.asarray(fit_all(simulations.x))
    assert fit.shape == (len(simulations), 14)
    assert np.all(np.isfinite(fit))
    truth = np.log(np.asarray(simulations.theta))
    off = np.abs(fit[:, :6] - truth[:, COLUMNS])
    assert np.all(np.median(off, axis=0) < 0.25)
    assert np.all(np.median(np.abs(fit[:, 6:8] - truth[:, 4:6]), axis=0) < 0.3)


def test_standard_errors_are_the_size_of_the_errors(simulations):
    fit = np.asarray(fit_all(simulations.x))
    truth = np.log(np.asarray(simulations.theta))[:, COLUMNS]
    scaled = np.abs(fit[:, :6] - truth) / np.exp(fit[:, 8:])
    # the median of |N(0, 1)| is .67
    assert np.all((np.median(scaled, axis=0) > 0.3) & (np.median(scaled, axis=0) < 1.5))


@pytest.mark.slow
def test_extreme_counts_give_finite_numbers_and_failed_ones_none():
    extreme = jnp.stack([jnp.full((21, 2), -370.0), jnp.full((21, 2), 70.0), jnp.zeros((21, 2))])
    assert np.all(np.isfinite(fit_all(jnp.tile(extreme, (171, 1, 1))[:512])))
    failed = with_fit(jnp.full((21, 2), jnp.nan))
    assert np.all(np.isnan(failed["fit"]))
