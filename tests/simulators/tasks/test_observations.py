"""Tasks with sets, images, series and missing entries: densities, references and missing data."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import simulators
from sbi_flows.prior import as_prior
from simulators import Task
from simulators.adapters import missing
from simulators.adapters.grid import sample_grid
from simulators.tasks import normal_set, random_field, sensors, two_instruments

DRAWS = 99


def nothing(key, x):
    return x


def ranks(
    task: Task,
    mask: Callable = nothing,
    distort: Callable = lambda draws: draws,
    datasets: int = 200,
) -> np.ndarray:
    """Return the ranks, as numbers in (0, 1), of true parameters in the draws of the reference.

    `mask` is a function of a random key and an observation that removes entries of it. `distort`
    changes the draws.
    """
    prior = as_prior(task.prior)
    theta = prior.sample(jax.random.key(1), datasets)

    def draw(key, theta):
        simulator_key, mask_key, reference_key = jax.random.split(key, 3)
        x = mask(mask_key, task.simulator(simulator_key, prior.structured(theta)))
        return distort(task.sample_reference(reference_key, x, DRAWS))

    keys = jax.random.split(jax.random.key(2), datasets)
    draws = jax.jit(lambda args: jax.lax.map(lambda row: draw(*row), args))((keys, theta))
    has_failed = np.isnan(np.asarray(draws)).any(axis=(1, 2))
    assert has_failed.mean() <= 0.05
    draws, theta = draws[~has_failed], theta[~has_failed]
    below = np.sum(np.asarray(draws) < np.asarray(theta)[:, None], axis=1)
    jitter = np.random.default_rng(3).uniform(size=below.shape)
    return (below + jitter) / (DRAWS + 1)


def drop_entries(key, x):
    """Remove each entry with a probability that is itself random."""
    limit_key, key = jax.random.split(key)
    return jnp.where(jax.random.uniform(key, x.shape) < jax.random.uniform(limit_key), x, jnp.nan)


def drop_instruments(key, x):
    drop_spectrum, drop_redshift = jax.random.bernoulli(key, 0.4, (2,))
    return {
        "spectrum": jnp.where(drop_spectrum, jnp.nan, x["spectrum"]),
        "redshift": jnp.where(drop_redshift, jnp.nan, x["redshift"]),
    }


MASKED = [
    (simulators.normal_set(), drop_entries),
    (simulators.random_field(size=16), nothing),
    (simulators.sensors(), drop_entries),
    (simulators.two_instruments(), drop_instruments),
]


@pytest.mark.release
@pytest.mark.promotes
@pytest.mark.parametrize(("task", "mask"), MASKED, ids=[task.name for task, _ in MASKED])
def test_ranks_of_true_parameters_are_uniform(task, mask):
    for values in ranks(task, mask).T:
        assert stats.kstest(values, "uniform").pvalue > 1e-3


def drop_trials(key, x):
    return jnp.where((jnp.arange(300) < jax.random.randint(key, (), 5, 301))[:, None], x, jnp.nan)


MASKED_SLOWLY = [
    (simulators.drift_diffusion(), drop_trials),
    (simulators.lens(), nothing),
    (simulators.ornstein_uhlenbeck(), nothing),
]


@pytest.mark.release
@pytest.mark.promotes
@pytest.mark.parametrize(("task", "mask"), MASKED_SLOWLY, ids=[t.name for t, _ in MASKED_SLOWLY])
def test_ranks_of_true_parameters_are_uniform_with_many_parameters(task, mask):
    for values in ranks(task, mask, datasets=40).T:
        assert stats.kstest(values, "uniform").pvalue > 1e-3


@pytest.mark.promotes
def test_ranks_in_draws_that_are_too_narrow_are_not_uniform():
    def narrow(draws):
        centre = jnp.mean(draws, axis=0, keepdims=True)
        return centre + 0.6 * (draws - centre)

    values = ranks(simulators.sensors(), drop_entries, narrow)
    assert stats.kstest(values.ravel(), "uniform").pvalue < 1e-3


def reference(name: str, x, n: int = 20_000) -> np.ndarray:
    sample = simulators.get(name).sample_reference
    assert sample is not None
    return np.asarray(sample(jax.random.key(5), x, n), float)


def test_normal_set_reference_against_its_density():
    """Compare with the density on a grid, which needs no conjugacy."""
    x = normal_set.observation(1, trials=5)
    seen = np.asarray(x[:5], float)
    variance = np.geomspace(0.02, 60, 600)[:, None]
    mean = np.linspace(-15, 15, 1501)
    log_density = stats.invgamma(3, scale=2).logpdf(variance) + np.log(variance)
    log_density = log_density + stats.norm.logpdf(mean, 0, np.sqrt(4 * variance))
    for value in seen:
        log_density = log_density + stats.norm.logpdf(value, mean, np.sqrt(variance))
    mass = np.exp(log_density - log_density.max())
    draws = reference("normal_set", x)
    for values, axis, marginal in (
        (draws[:, 0], variance[:, 0], mass.sum(axis=1)),
        (draws[:, 1], mean, mass.sum(axis=0)),
    ):
        cdf = (np.cumsum(marginal) - marginal / 2) / marginal.sum()
        exact = np.interp(values, axis, cdf)
        assert stats.kstest(exact, "uniform").statistic < 1.95 / np.sqrt(len(values))  # p = .001


@pytest.mark.parametrize("name", ["normal_set", "sensors"])
def test_missing_entries_do_not_matter(name):
    """The place of the other entries matters in `sensors` alone."""
    module = {"normal_set": normal_set, "sensors": sensors}[name]
    x = module.observation(2, 10)
    assert int(jnp.sum(~jnp.isnan(x))) == 10
    seen = np.flatnonzero(~np.isnan(x))
    if name == "normal_set":
        moved = jnp.full_like(x, jnp.nan).at[-10:].set(x[seen])
        np.testing.assert_allclose(reference(name, moved), reference(name, x), rtol=1e-4, atol=1e-5)
    else:
        design = sensors.design_matrix()[seen].astype(float)
        precision = np.eye(5) + design.T @ design / 0.25
        draws, mean = reference(name, x), np.linalg.solve(precision, design.T @ x[seen] / 0.25)
        white = (draws - mean) @ np.linalg.cholesky(precision)
        assert stats.kstest(white.ravel(), "norm").pvalue > 1e-3
        np.testing.assert_allclose(np.cov(white.T), np.eye(5), atol=0.05)


@pytest.mark.promotes
@pytest.mark.parametrize("name", ["normal_set", "sensors", "two_instruments"])
def test_nothing_seen_gives_the_prior(name):
    task = simulators.get(name)
    x = jax.tree.map(lambda v: jnp.full_like(v, jnp.nan), task.observation(1))
    prior = np.asarray(as_prior(task.prior).sample(jax.random.key(8), 20_000), float)
    for got, expected in zip(reference(name, x).T, prior.T, strict=True):
        assert stats.ks_2samp(got, expected).pvalue > 1e-3


def test_two_instruments_share_the_redshift():
    """Three independent sources of information on the redshift add up."""
    x = two_instruments.observation(1)
    both = reference("two_instruments", x)[:, 2]
    spectrum = reference("two_instruments", two_instruments.observation(1, ["spectrum"]))[:, 2]
    redshift = reference("two_instruments", two_instruments.observation(1, ["redshift"]))[:, 2]
    exact = 1 / (1 + 1 / 0.09)
    assert redshift.var() == pytest.approx(exact, rel=0.05)
    assert redshift.mean() == pytest.approx(exact / 0.09 * float(x["redshift"]), abs=0.01)
    assert both.var() == pytest.approx(1 / (1 / spectrum.var() + 1 / 0.09), rel=0.05)
    assert spectrum.var() < 0.5


def test_the_line_of_two_instruments_moves_with_the_redshift():
    """The design is the derivative of the line with respect to its place."""
    u, shift = np.linspace(-1, 1, 100), 0.03 * 1e-4
    moved = 3 * (np.exp(-50 * (u - shift) ** 2) - np.exp(-50 * u**2)) / 1e-4
    np.testing.assert_allclose(two_instruments.design_matrix()[:100, 2], moved, atol=1e-3)


def test_wrong_numbers_of_entries():
    with pytest.raises(ValueError, match="trials: expected 0 to 100, got 101"):
        normal_set.observation(1, trials=101)
    with pytest.raises(ValueError, match="expected 0 to 3, got -1"):
        missing.keep_first(jnp.zeros(3), -1)
    for wrong in (("camera",), "redshift"):
        with pytest.raises(ValueError, match="instruments: expected names out of"):
            two_instruments.observation(1, wrong)


def simulated(name: str, theta: dict[str, float], count: int) -> np.ndarray:
    """Simulate at one parameter vector, shape (count, *event)."""
    simulator, keys = simulators.get(name).simulator, jax.random.split(jax.random.key(7), count)
    values = {name: jnp.float32(value) for name, value in theta.items()}
    return np.asarray(jax.jit(jax.vmap(lambda key: simulator(key, values)))(keys), float)


def test_the_modes_of_a_random_field_have_its_power_spectrum():
    theta = {"log_amplitude": 2.0, "index": -2.5}
    modes = np.fft.fft2(simulated("random_field", theta, 400), norm="ortho")
    k = np.fft.fftfreq(64) * 64
    radius = np.hypot(k[:, None], k)
    radius[0, 0] = np.inf
    expected = np.exp(2.0) * (radius / 8) ** -2.5 + 1.0
    assert stats.kstest(modes[:, 0, 0].real, "norm").pvalue > 1e-3  # the white noise alone
    half = modes[:, :, 1:32] / np.sqrt(expected[:, 1:32] / 2)  # no conjugate pair in this half
    assert stats.kstest(half.real[:, ::4].ravel(), "norm").pvalue > 1e-3
    assert stats.kstest(half.imag[:, ::4].ravel(), "norm").pvalue > 1e-3
    ratio = np.mean(np.abs(half) ** 2, axis=0) / 2
    assert np.abs(ratio - 1).max() < 5 / np.sqrt(400)


def test_the_likelihood_of_a_random_field_is_that_of_its_pixels():
    """Compare differences of log likelihoods with the multivariate normal density of 256 pixels."""
    task, size = simulators.random_field(size=16), 16
    x = task.observation(1)
    k = np.fft.fftfreq(size) * size
    radius = np.hypot(k[:, None], k)
    thetas, expected, got = [(0.0, -2.0), (1.5, -3.5), (2.0, -1.0)], [], []
    for amplitude, index in thetas:
        with np.errstate(divide="ignore"):
            power = np.where(radius > 0, np.exp(amplitude) * (radius / 2) ** index, 0.0)
        kernel = np.fft.ifft2(power + 1.0).real
        rows = np.arange(size)
        shift = (rows[:, None] - rows) % size
        covariance = kernel[shift[:, None, :, None], shift[None, :, None, :]]
        normal = stats.multivariate_normal(cov=covariance.reshape(256, 256))
        expected.append(normal.logpdf(np.asarray(x, float).ravel()))
        got.append(float(random_field.log_likelihood(jnp.array([amplitude, index]), x)))
    np.testing.assert_allclose(np.diff(got), np.diff(expected), rtol=1e-3)


def test_sizes_of_a_random_field():
    assert simulators.random_field(size=16).name == "random_field_16"
    with pytest.raises(ValueError, match="expected an even number >= 16, got 17"):
        simulators.random_field(size=17)


@pytest.mark.parametrize("scale", [0.03, 5.0])
def test_draws_from_a_grid(scale):
    """A narrow correlated normal density, and one that the rectangle truncates."""
    factor = np.array([[1.0, 0.0], [0.8, 0.6]])

    def log_density(theta):
        return -0.5 * jnp.sum(
            (jnp.asarray(np.linalg.inv(factor), jnp.float32) @ theta / scale) ** 2
        )

    low, high, n = jnp.array([-1.0, -2.0]), jnp.array([1.0, 0.5]), 20_000
    draws = np.asarray(sample_grid(jax.random.key(0), log_density, low, high, n), float)
    axes = [np.linspace(low[i], high[i], 2002)[1:-1:2] for i in range(2)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    mass = np.exp(-0.5 * np.sum((grid @ np.linalg.inv(factor).T / scale) ** 2, axis=-1))
    for axis in range(2):
        marginal = mass.sum(axis=1 - axis)
        cdf = (np.cumsum(marginal) - marginal / 2) / marginal.sum()
        exact = np.interp(draws[:, axis], axes[axis], cdf)
        assert stats.kstest(exact, "uniform").statistic < 1.95 / np.sqrt(n)  # p = .001
    if scale < 1:
        assert np.corrcoef(draws.T)[0, 1] == pytest.approx(0.8, abs=0.01)
