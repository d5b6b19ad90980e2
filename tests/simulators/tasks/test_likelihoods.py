"""Tasks with a likelihood in closed form: densities against simulations and other formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.integrate import cumulative_trapezoid

import simulators
from simulators.adapters import mcmc
from simulators.adapters.importance import ImportanceReference
from simulators.tasks import drift_diffusion, g_and_k, lens, ornstein_uhlenbeck


def numbers(theta: dict[str, float]) -> dict[str, jax.Array]:
    return {name: jnp.float32(value) for name, value in theta.items()}


def simulated(name: str, theta: dict[str, float], count: int) -> np.ndarray:
    """Simulate at one parameter vector, shape (count, *event)."""
    simulator, keys = simulators.get(name).simulator, jax.random.split(jax.random.key(7), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: simulator(key, numbers(theta))))(keys), float)


DECISIONS = [
    {"drift": -1.0, "boundary": 1.5, "bias": 0.4, "non_decision": 0.2},
    {"drift": 2.5, "boundary": 0.6, "bias": 0.7, "non_decision": 0.5},
    {"drift": 0.0, "boundary": 2.5, "bias": 0.3, "non_decision": 0.1},
]


@pytest.mark.parametrize("theta", DECISIONS)
def test_the_density_of_drift_diffusion_against_a_long_series(theta):
    """Compare with 400 terms of the long-time series of Feller in double precision."""
    v, a, w = theta["drift"], theta["boundary"], theta["bias"]
    times = np.geomspace(0.02, 12, 200) * a**2
    k = np.arange(1, 401)[:, None]
    for choice in (0.0, 1.0):
        drift, start = (-v, 1 - w) if choice else (v, w)
        terms = k * np.exp(-((k * np.pi / a) ** 2) * times / 2) * np.sin(k * np.pi * start)
        front = np.pi / a**2 * np.exp(-drift * a * start - drift**2 * times / 2)
        x = jnp.stack([times + theta["non_decision"], np.full(200, choice)], axis=-1)
        got = np.exp(np.asarray(drift_diffusion.log_density(x, numbers(theta)), float))
        np.testing.assert_allclose(got, front * terms.sum(axis=0), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("theta", DECISIONS)
def test_simulated_decisions_follow_the_density(theta):
    v, a, w = theta["drift"], theta["boundary"], theta["bias"]
    x = simulated("drift_diffusion", theta, 200).reshape(-1, 2)
    times = np.geomspace(1e-4, 12, 20_000) * a**2
    total = 0.0
    for choice in (0.0, 1.0):
        rows = jnp.stack([times + theta["non_decision"], np.full(len(times), choice)], axis=-1)
        density = np.exp(np.asarray(drift_diffusion.log_density(rows, numbers(theta)), float))
        cdf = cumulative_trapezoid(density, times, initial=0.0)
        total += cdf[-1]
        seen = x[x[:, 1] == choice, 0] - theta["non_decision"]
        assert abs(len(seen) / len(x) - cdf[-1]) < 4 * np.sqrt(cdf[-1] / len(x))
        assert stats.kstest(np.interp(seen, times, cdf / cdf[-1]), "uniform").pvalue > 1e-3
    assert total == pytest.approx(1.0, abs=1e-4)
    # the probability of the lower end, Ratcliff 1978, appendix, and its limit without drift
    lower = 1 - w if v == 0 else np.expm1(-2 * v * a * (1 - w)) / np.expm1(-2 * v * a)
    lower = lower if v == 0 else lower * np.exp(-2 * v * a * w)
    assert abs(np.mean(x[:, 1] == 0) - lower) < 4 * np.sqrt(lower / len(x))


def test_the_mean_decision_time_of_an_unbiased_process():
    """Wagenmakers et al. 2007, An EZ-diffusion model for response time and accuracy."""
    theta = {"drift": 1.2, "boundary": 1.8, "bias": 0.5, "non_decision": 0.3}
    times = simulated("drift_diffusion", theta, 200)[:, :, 0].ravel() - 0.3
    expected = 1.8 / 2.4 * np.tanh(1.2 * 1.8 / 2)
    assert abs(times.mean() - expected) < 4 * times.std() / np.sqrt(len(times))


def test_decisions_that_are_missing_or_impossible():
    theta = numbers(DECISIONS[0])
    x = jnp.array([[0.5, 1.0], [jnp.nan, jnp.nan], [0.15, 0.0]])
    got = drift_diffusion.log_density(x, theta)
    assert jnp.isfinite(got[0]) and got[1] == 0.0 and got[2] == -jnp.inf
    slopes = jax.jacobian(lambda theta: drift_diffusion.log_density(x, theta)[:2])(theta)
    assert all(jnp.all(jnp.isfinite(slope)) for slope in slopes.values())


@pytest.mark.release
@pytest.mark.promotes
def test_missing_decisions_do_not_matter():
    x = drift_diffusion.observation(1, trials=20)
    sample = simulators.drift_diffusion().sample_reference
    assert sample is not None
    moved = jnp.full_like(x, jnp.nan).at[200:220].set(x[:20])
    draws = [np.asarray(sample(jax.random.key(0), rows, 2000)) for rows in (x, moved, x[:20])]
    for other in draws[1:]:
        for d in range(4):
            assert stats.ks_2samp(draws[0][:, d], other[:, d], method="asymp").pvalue > 1e-3
    few = sample(jax.random.key(0), x.at[2:].set(jnp.nan), 2000)
    assert np.all(np.std(few, axis=0) > 1.05 * np.std(draws[0], axis=0))


ARCS = {"x": 0.3, "y": 0.0, "einstein_radius": 1.2, "source_radius": 0.3, "brightness": 5.0}


def test_images_of_a_point_on_the_axis_of_the_lens():
    """A source at distance 0.3 from the centre has images at 1.2 + 0.3 and -(1.2 - 0.3)."""
    clean = np.asarray(lens.image(numbers(ARCS)), float)
    axis = 2.5 * ((2 * np.arange(32) + 1) / 32 - 1)
    row = clean[15:17].mean(axis=0)  # next to y = 0
    for place in (1.5, -0.9):
        side = np.sign(axis) == np.sign(place)
        centre = np.sum(row[side] * axis[side]) / row[side].sum()
        assert centre == pytest.approx(place, abs=0.05)
        assert row[side].max() == pytest.approx(5.0, rel=0.1)
    np.testing.assert_allclose(clean, clean[::-1], rtol=1e-4, atol=1e-5)  # mirrored in y
    turned = {**ARCS, "x": 0.0, "y": 0.3}
    np.testing.assert_allclose(lens.image(numbers(turned)), clean.T, rtol=1e-4, atol=1e-5)


@pytest.mark.release
def test_the_noise_of_an_image_and_missing_pixels():
    noise = simulated("lens", ARCS, 20) - np.asarray(lens.image(numbers(ARCS)))
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    x = jnp.full((32, 32), jnp.nan)
    sample = simulators.lens().sample_reference
    assert sample is not None
    draws = np.asarray(sample(jax.random.key(0), x, 1000))
    for values, (low, high) in zip(draws.T, lens.BOUNDS.values(), strict=True):
        assert stats.kstest((values - low) / (high - low), "uniform").pvalue > 1e-3


PATH = {"log_rate": 0.5, "mean": 0.3, "log_sigma": 0.1}


def test_the_likelihood_of_an_ornstein_uhlenbeck_process_is_multivariate_normal():
    x = jnp.array([jnp.nan, 0.2, 0.5, jnp.nan, jnp.nan, -0.4, 1.0, jnp.nan])
    seen = np.flatnonzero(~np.isnan(x))
    variance = np.exp(0.2) / (2 * np.exp(0.5))
    distance = 0.1 * np.abs(seen[:, None] - seen)
    normal = stats.multivariate_normal(np.full(4, 0.3), variance * np.exp(-np.exp(0.5) * distance))
    got = ornstein_uhlenbeck.log_likelihood(numbers(PATH), x)
    np.testing.assert_allclose(got, normal.logpdf(np.asarray(x)[seen]), rtol=1e-4)


def test_simulated_paths_have_the_covariance_of_the_process():
    x = simulated("ornstein_uhlenbeck", PATH, 400)
    is_seen = ~np.isnan(x)
    assert abs(is_seen.mean() - 0.5) < 4 * 0.5 / np.sqrt(x.size)
    variance = np.exp(0.2) / (2 * np.exp(0.5))
    assert stats.kstest((x[is_seen][::50] - 0.3) / np.sqrt(variance), "norm").pvalue > 1e-3
    for lag in (1, 3, 10):
        products = (x[:, :-lag] - 0.3) * (x[:, lag:] - 0.3)
        means = np.nanmean(products, axis=1)
        expected = variance * np.exp(-np.exp(0.5) * 0.1 * lag)
        assert abs(means.mean() - expected) < 4 * means.std() / 20


QUANTILES = [
    {"a": 3.0, "b": 1.0, "g": 2.0, "k": 0.5},
    {"a": 0.0, "b": 0.1, "g": 4.0, "k": 0.0},
    {"a": 10.0, "b": 10.0, "g": 0.0, "k": 1.0},
]


def quantile(theta: dict[str, float], z: np.ndarray) -> np.ndarray:
    """Rayner and MacGillivray 2002, with (1 - exp(-g z)) / (1 + exp(-g z))."""
    skew = (1 - np.exp(-theta["g"] * z)) / (1 + np.exp(-theta["g"] * z))
    return theta["a"] + theta["b"] * (1 + 0.8 * skew) * (1 + z**2) ** theta["k"] * z


@pytest.mark.parametrize("theta", QUANTILES)
def test_the_density_and_the_draws_of_g_and_k(theta):
    z, step = np.linspace(-4.5, 4.5, 301), 1e-5
    slope = (quantile(theta, z + step) - quantile(theta, z - step)) / (2 * step)
    x = jnp.asarray(quantile(theta, z), jnp.float32)
    got = np.asarray(g_and_k.log_density(numbers(theta), x), float)
    np.testing.assert_allclose(got, stats.norm.logpdf(z) - np.log(slope), atol=2e-3)
    fine = np.linspace(-6, 6, 4001)
    draws = simulated("g_and_k", theta, 20).ravel()
    levels = stats.norm.cdf(np.interp(draws, quantile(theta, fine), fine))
    assert stats.kstest(levels, "uniform").pvalue > 1e-3


@pytest.mark.release
def test_the_gradient_of_the_density_of_g_and_k_and_missing_draws():
    """NUTS needs the gradient through the numerical inversion."""
    theta, x = numbers(QUANTILES[0]), jnp.array([2.0, jnp.nan, 3.5, 9.0])
    density = g_and_k.log_density(theta, x)
    assert density[1] == 0.0
    np.testing.assert_array_equal(density[0], g_and_k.log_density(theta, x[:1])[0])
    slopes = jax.jacfwd(lambda theta: g_and_k.log_density(theta, x))(theta)
    for name, slope in slopes.items():
        moved = [g_and_k.log_density({**theta, name: theta[name] + d}, x) for d in (0.01, -0.01)]
        np.testing.assert_allclose(slope, (moved[0] - moved[1]) / 0.02, atol=5e-3)


MODELS = {
    "drift_diffusion": (drift_diffusion._model, drift_diffusion._importance.sites),
    "g_and_k": (g_and_k._model, tuple(g_and_k.BOUNDS)),
    "lens": (lens._model, tuple(lens.BOUNDS)),
    "ornstein_uhlenbeck": (ornstein_uhlenbeck._model, tuple(PATH)),
}


@pytest.mark.release
@pytest.mark.promotes
@pytest.mark.parametrize("name", MODELS)
def test_importance_resampling_agrees_with_nuts(name):
    model, sites = MODELS[name]
    x = simulators.get(name).observation(1)
    if name == "g_and_k":  # its density is slow
        x = x[:200]
    chains = mcmc.NutsReference(model, sites)(jax.random.key(1), x, 1000)
    draws, efficiency = ImportanceReference(model, sites).diagnosed(jax.random.key(2), x, 4000)
    assert efficiency > 0.2
    for d in range(len(sites)):
        assert stats.ks_2samp(chains[:, d], draws[:, d], method="asymp").pvalue > 1e-4
