"""Grids are found where they are, noise fills their gaps, and rounding gives the values back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbi_flows.observations.quantised import dequantised, find_grid, quantised

N = 1_000
RNG = np.random.default_rng(0)
STEPPED = {
    "counts": (RNG.poisson(6.0, N), 1.0),
    "0 or 1": (RNG.integers(0, 2, N), 1.0),
    "shares of 20": (RNG.binomial(20, 0.4, N) / 20, 0.05),
    "hundreds": (100.0 * RNG.poisson(3.0, N) - 500.0, 100.0),
    "halves": (RNG.poisson(0.3, N) + 0.5, 1.0),
}
CONSTANTS = (7.25, 1e8, 1e-3, 0.0)
CONTINUOUS = {
    "normal": RNG.normal(size=N),
    "large and whole in float32": np.float32(1e8 + 1e7 * RNG.normal(size=N)),
    "some zeros": np.where(RNG.random(N) < 0.3, 0.0, RNG.normal(size=N)),
}


@pytest.mark.parametrize("name", STEPPED)
def test_rounding_undoes_the_noise(name):
    values, step = STEPPED[name]
    x = jnp.asarray(values[:, None], jnp.float32)
    grid = find_grid(np.asarray(x))
    np.testing.assert_allclose(grid.step, [step], rtol=1e-3)
    noisy = dequantised(grid, jax.random.key(0), x)
    assert len(np.unique(noisy)) > 0.99 * N
    noise = (np.asarray(noisy) - np.asarray(x)) / step
    assert np.ptp(noise) > 0.95 and abs(np.std(noise) - np.sqrt(1 / 12)) < 0.02
    np.testing.assert_allclose(quantised(grid, noisy), x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_columns_stay_as_they_are(name):
    x = jnp.asarray(CONTINUOUS[name][:, None], jnp.float32)
    grid = find_grid(np.asarray(x))
    assert float(grid.step[0]) == 0.0
    np.testing.assert_array_equal(dequantised(grid, jax.random.key(0), x), x)
    np.testing.assert_array_equal(quantised(grid, x), x)


def test_only_ends_that_hold_many_rows_cannot_be_passed():
    x = np.stack([RNG.poisson(6.0, N), RNG.integers(0, 2, N), RNG.poisson(60.0, N) - 60], axis=1)
    grid = find_grid(x.astype(np.float32))
    far = quantised(grid, jnp.array([[1e3, 1e3, 1e3], [-1e3, -1e3, -1e3]]))
    # counts have no largest one, but none is below zero; 0 or 1 has both ends; the last has none
    np.testing.assert_allclose(far, [[1e3, 1.0, 1e3], [0.0, 0.0, -1e3]])


@pytest.mark.parametrize("value", CONSTANTS)
def test_constants_stay_and_come_back(value):
    x = jnp.full((N, 1), value)
    grid = find_grid(np.asarray(x))
    assert np.isinf(grid.step[0])
    np.testing.assert_array_equal(dequantised(grid, jax.random.key(0), x), x)
    np.testing.assert_array_equal(quantised(grid, x + 1e3), x)


def test_what_is_rounded_stays_on_the_grid():
    """The first value that is not negative need not be zero."""
    rare = np.concatenate([np.full(5, 1.5), np.full(495, 2.5), np.full(500, 3.5)])
    grid = find_grid(rare[:, None])
    np.testing.assert_allclose(
        quantised(grid, jnp.array([[-7.0], [0.2], [9.0]])), [[0.5], [0.5], [3.5]]
    )
