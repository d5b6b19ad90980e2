"""Reference samplers against closed forms, grids and the published reference posteriors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

import simulators
from sbi_flows.diagnostics.c2st import c2st
from simulators.adapters.sampling import log_interval_mass, rejection, truncated_normal
from tests.simulators.tasks.published import published

TASKS = ["two_moons", "gaussian_mixture", "gaussian_linear", "gaussian_linear_uniform", "slcp"]
N = 10_000


def draws(name: str, x: np.ndarray, n: int = N) -> np.ndarray:
    sample = simulators.get(name).sample_reference
    assert sample is not None
    return np.asarray(sample(jax.random.key(11), jnp.asarray(x, jnp.float32), n), float)


@pytest.mark.parametrize("name", TASKS)
def test_draws_stay_in_the_box(name):
    task = simulators.get(name)
    theta = np.abs(draws(name, task.observation(1), 2500))
    assert theta.shape == (2500, task.dim)
    bound = {"gaussian_mixture": 10, "slcp": 3, "gaussian_linear": np.inf}.get(name, 1)
    assert theta.max() <= bound


def test_gaussian_linear_closed_form():
    x = np.linspace(-1, 1, 10)
    z = (draws("gaussian_linear", x) - x / 2) / np.sqrt(0.05)
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    np.testing.assert_allclose(np.cov(z.T), np.eye(10), atol=0.07)


def test_gaussian_linear_uniform_closed_form():
    x, sd = np.array([0, 0.3, 0.9, 1.0, 1.5, 2.5, -0.5, -1.0, -2.0, -2.9]), np.sqrt(0.1)
    theta = draws("gaussian_linear_uniform", x)
    for d in range(10):
        exact = stats.truncnorm((-1 - x[d]) / sd, (1 - x[d]) / sd, x[d], sd)
        assert stats.kstest(theta[:, d], exact.cdf).pvalue > 1e-3


def two_moons_density(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    u = x[0] - 0.25 + np.abs(theta[0] + theta[1]) / np.sqrt(2)
    v = x[1] - (theta[1] - theta[0]) / np.sqrt(2)
    r = np.hypot(u, v)
    return np.where(u > 0, stats.norm.pdf(r, 0.1, 0.01) / (np.pi * r), 0.0)


def gaussian_mixture_density(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    squares = (theta[0] - x[0]) ** 2 + (theta[1] - x[1]) ** 2
    return np.exp(-squares / 2) + np.exp(-squares / 0.02) / 0.01


@pytest.mark.parametrize(
    ("name", "density", "bound", "x"),
    [
        ("two_moons", two_moons_density, 1, (0.0, 0.0)),  # the crescents lie well inside
        ("two_moons", two_moons_density, 1, (0.34, 0.02)),  # they meet
        ("two_moons", two_moons_density, 1, (-1.0, 0.05)),  # corners cut them off
        ("gaussian_mixture", gaussian_mixture_density, 10, (1.0, -2.0)),
        ("gaussian_mixture", gaussian_mixture_density, 10, (9.9, -10.1)),
        ("gaussian_mixture", gaussian_mixture_density, 10, (11.5, 3.0)),
    ],
)
def test_two_dimensional_posterior_on_a_grid(name, density, bound, x):
    """Chi-square test of counts in boxes around the draws against the integrated density."""
    x, theta, bins, points = np.array(x), draws(name, x), 24, 25
    low, high = theta.min(axis=0), theta.max(axis=0)
    edges = [np.linspace(low[d], high[d], bins + 1) for d in range(2)]
    fine = [
        low[d] + (high[d] - low[d]) * (np.arange(bins * points) + 0.5) / (bins * points)
        for d in range(2)
    ]
    grid = np.stack(np.meshgrid(*fine, indexing="ij"))
    mass = np.where(np.all(np.abs(grid) <= bound, axis=0), density(grid, x), 0.0)
    mass = mass.reshape(bins, points, bins, points).sum(axis=(1, 3))
    expected = N * mass / mass.sum()
    counts = np.histogram2d(*theta.T, bins=edges)[0]
    full = expected > 5
    got = np.append(counts[full], counts[~full].sum())
    want = np.append(expected[full], expected[~full].sum())
    assert full.sum() > 5
    statistic = np.sum((got - want) ** 2 / np.maximum(want, 1.0))
    assert stats.chi2(full.sum()).sf(statistic) > 1e-3


@pytest.mark.parametrize(
    ("theta3", "theta4"),
    [
        (0.3, 0.5),
        *(pytest.param(*p, marks=pytest.mark.release) for p in [(0.02, 0.4), (0.03, -0.04)]),
    ],
)
def test_slcp_covariance_on_a_grid(theta3, theta4):
    """Compare with a grid, where the box does not truncate the mean, for small and large jitter."""
    theta = jnp.array([0.3, -0.5, theta3, theta4, 0.8])
    x = np.asarray(simulators.slcp().simulator(jax.random.key(3), theta), float)
    got = draws("slcp", x)
    for d in (2, 3):  # both signs alike
        assert stats.binomtest(int((got[:, d] > 0).sum()), N).pvalue > 1e-3
    got = np.column_stack([np.abs(got[:, 2:4]), got[:, 4]])
    ends = [np.geomspace(np.quantile(g, 1e-3) / 4, min(3, 1.5 * g.max()), 181) for g in got.T[:2]]
    ends = [*(np.append(0, e) for e in ends), np.linspace(-3, 3, 121)]
    axes, widths = [(e[1:] + e[:-1]) / 2 for e in ends], [np.diff(e) for e in ends]
    t3, t4, t5 = np.meshgrid(*axes, indexing="ij", sparse=True)
    centred = x.reshape(4, 2) - x.reshape(4, 2).mean(axis=0)
    scatter = centred.T @ centred
    xx, yy, xy = t3**4 + 1e-6, t4**4 + 1e-6, (t3 * t4) ** 2 * np.tanh(t5)
    det = xx * yy - xy**2
    squares = (scatter[0, 0] * yy + scatter[1, 1] * xx - 2 * scatter[0, 1] * xy) / det
    log_density = -1.5 * np.log(det) - squares / 2
    mass = np.exp(log_density - log_density.max())
    mass = mass * widths[0][:, None, None] * widths[1][:, None]
    mass /= mass.sum()
    for d in range(3):
        marginal = mass.sum(axis=tuple({0, 1, 2} - {d}))
        exact = np.interp(got[:, d], ends[d], np.append(0, np.cumsum(marginal)))
        assert stats.kstest(exact, "uniform").statistic < 1.95 / np.sqrt(N)  # p = .001


@pytest.mark.parametrize("name", ["two_moons", "gaussian_mixture"])
def test_published_reference_c2st(name):
    x, posterior = published(name, "x_1"), published(name, "posterior_1")
    assert c2st(posterior, draws(name, x, len(posterior))) <= 0.53


@pytest.mark.release
@pytest.mark.parametrize("name", ["gaussian_linear", "gaussian_linear_uniform", "slcp"])
def test_published_reference_c2st_of_more_dimensions(name):
    x, posterior = published(name, "x_1"), published(name, "posterior_1")
    assert c2st(posterior, draws(name, x, len(posterior)), jobs=-1) <= 0.53


def energy_p_value(a: np.ndarray, b: np.ndarray, permutations: int = 300) -> float:
    """Permutation test of equality by the energy distance, coordinates scaled by a's sd."""
    rows = np.concatenate([a, b]) / a.std(axis=0)
    distance = cdist(rows, rows).astype(np.float32)
    label = np.repeat([1.0, -1.0], len(a)).astype(np.float32)
    rng = np.random.default_rng(0)
    labels = np.stack([label, *(rng.permutation(label) for _ in range(permutations))])
    energy = -np.sum((labels @ distance) * labels, axis=1)
    return float(np.mean(energy >= energy[0]))


@pytest.mark.parametrize("name", ["gaussian_linear", "gaussian_linear_uniform", "slcp"])
def test_published_reference_energy_distance(name):
    x, posterior = published(name, "x_1"), published(name, "posterior_1")
    posterior = posterior[:1000]
    theta = draws(name, x, len(posterior))
    assert energy_p_value(posterior, theta) > 0.01
    shifted = theta + 0.2 * posterior.std(axis=0)
    assert energy_p_value(posterior, shifted) < 0.01  # the test has power


@pytest.mark.parametrize("loc", [0.0, 0.99, 3.0, -8.0, 12.0])
def test_truncated_normal(loc):
    z = truncated_normal(jax.random.key(2), jnp.array([loc]), 1.0, -1.0, 1.0, N)
    exact = stats.truncnorm(-1 - loc, 1 - loc, loc)
    assert stats.kstest(np.asarray(z[:, 0], float), exact.cdf).pvalue > 1e-3
    mass = log_interval_mass(jnp.array([loc]), 1.0, -1.0, 1.0)
    upper, lower = stats.norm.logcdf([1 - abs(loc), -1 - abs(loc)])
    np.testing.assert_allclose(mass, [upper + np.log1p(-np.exp(lower - upper))], rtol=1e-4)


def test_truncated_normal_too_far_is_nan():
    z = truncated_normal(jax.random.key(2), jnp.array([0.0, 40.0]), 1.0, -1.0, 1.0, 5)
    assert jnp.all(jnp.isfinite(z[:, 0])) and jnp.all(jnp.isnan(z[:, 1]))


def test_rejection_runs_out_of_rounds():
    def propose(key):
        z = jax.random.normal(key, (10, 1))
        return z, jnp.arange(10) < 2

    got = rejection(jax.random.key(0), propose, 25, max_rounds=4)
    assert jnp.all(jnp.isfinite(got[:8])) and jnp.all(jnp.isnan(got[8:]))
    assert jnp.all(jnp.isfinite(rejection(jax.random.key(0), propose, 25)))


def test_impossible_observation_gives_nan():
    theta = simulators.two_moons().sample_reference(jax.random.key(0), jnp.array([5.0, 0.0]), 10)
    assert jnp.all(jnp.isnan(theta))


def test_references_of_many_observations_at_once():
    sample = simulators.two_moons().sample_reference
    x = jnp.array([[0.0, 0.0], [-0.5, 0.3]])
    got = jax.vmap(lambda key, x: sample(key, x, 50))(jax.random.split(jax.random.key(0)), x)
    assert got.shape == (2, 50, 2)
    assert jnp.all(jnp.isfinite(got))
