"""Rotation of circular coordinates: fits of the direction, and models that use it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from sbi_flows.densities.conditional import Blueprint, graph_of, initial_weights
from sbi_flows.densities.sizes import Sizes
from sbi_flows.densities.start import fit_linear_start
from sbi_flows.densities.turn import Turn
from sbi_flows.prior.circular import HALF_WIDTH
from tests.artefacts import perturbed
from tests.cases import DENSITIES

pytestmark = pytest.mark.promotes

ROWS, PER_RADIAN = 2000, HALF_WIDTH / np.pi
fit = jax.jit(fit_linear_start, static_argnums=(4, 5))


def fitted(theta: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Fit the start of one angle, and return the residuals of all rows in radians."""
    y, order = jnp.asarray(PER_RADIAN * theta, jnp.float32)[:, None], jnp.arange(len(theta))
    features = jnp.asarray(c, jnp.float32)
    start = fit(y, features, order[200:], order[:200], (True,), (True,))
    return np.asarray(start.turn.rotation(features, (True,)).inverse(y)[:, 0]) / PER_RADIAN


def angles(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-np.pi, np.pi, ROWS)


def test_cosine_and_sine_give_the_direction():
    rng = np.random.default_rng(0)
    theta = angles(rng)
    c = np.stack([np.cos(theta), np.sin(theta)], axis=1) + 0.1 * rng.normal(size=(ROWS, 2))
    residual = fitted(theta, c)
    # the noise has a tangential sd of 0.1
    assert abs(np.std(residual) - 0.1) < 0.01 and np.max(np.abs(residual)) < 0.6


def test_a_feature_that_is_an_angle_gives_the_direction():
    rng = np.random.default_rng(1)
    theta = angles(rng)
    c = (theta + 0.2 * rng.normal(size=ROWS) + np.pi) % (2 * np.pi) - np.pi
    residual = fitted(theta, 0.7 * c[:, None] + 0.3)
    assert abs(np.std(residual) - 0.2) < 0.02


def test_without_information_the_angle_is_turned_to_its_mean_direction():
    rng = np.random.default_rng(2)
    theta = rng.vonmises(3.0, 4.0, ROWS)
    residual = fitted(theta, rng.normal(size=(ROWS, 2)))
    assert abs(np.mean(residual)) < 0.05 and np.std(residual) < 0.6


def test_the_direction_given_a_cosine_alone_does_not_jump():
    """A direction of 0 or pi would make the posterior jump where the cosine changes its sign."""
    rng = np.random.default_rng(4)
    theta = angles(rng)
    c = np.cos(theta) + 0.1 * rng.normal(size=ROWS)
    near = np.argsort(np.abs(c))[:100]
    turns = np.exp(1j * (theta - fitted(theta, c[:, None])))[near]
    assert np.abs(np.mean(turns)) > 0.95


def test_each_coordinate_has_its_own_direction_and_lines_have_none():
    """Correlated residuals of an angle and a line are one linear-Gaussian posterior."""
    rng = np.random.default_rng(3)
    theta, line = angles(rng), rng.normal(size=ROWS)
    shift = 0.1 * rng.normal(size=ROWS)
    c = np.stack([np.cos(theta + shift), np.sin(theta + shift), line + 5 * shift], axis=1)
    y = jnp.asarray(np.stack([line, PER_RADIAN * theta], axis=1), jnp.float32)
    features, order = jnp.asarray(c, jnp.float32), jnp.arange(ROWS)
    bounded, circular = (False, True), (False, True)
    start = fit(y, features, order[200:], order[:200], bounded, circular)
    turned = start.turn.rotation(features, circular).inverse(y)
    np.testing.assert_array_equal(turned[:, 0], y[:, 0])
    noise = start.from_predictor(features @ start.weight, bounded).inverse(turned)
    assert abs(np.corrcoef(np.asarray(noise).T)[0, 1]) < 0.1
    np.testing.assert_allclose(np.std(noise, axis=0), 1.0, atol=0.1)


CIRCULAR, BOUNDED = (True, False), (True, False)
EDGES = np.linspace(-HALF_WIDTH, HALF_WIDTH, 301)
LINE = np.linspace(-9.0, 9.0, 301)


@pytest.fixture(scope="module", params=["NSF", "MAF", "mixture"])
def model(request):
    """Return functions of a perturbed model of one circular and one unbounded coordinate."""
    sizes = Sizes(BOUNDED, jax.tree.structure(0), ((3,),), CIRCULAR)
    blueprint = Blueprint(DENSITIES[request.param], None, sizes)
    params, rest = initial_weights(blueprint, jax.random.key(0), None)
    params, rest = perturbed(jax.random.key(1), (params, rest), 0.03)
    # the direction of the angle is close to the seam
    turn = Turn(jnp.zeros((3, 3)).at[0, 1].set(0.3), jnp.array([-1.0, 0.1, 0.0]))
    rest["start"] = rest["start"]._replace(turn=turn)

    @jax.jit
    def log_prob(y: Array, features: Array) -> Array:
        return nnx.merge(graph_of(blueprint), params, rest)(features).log_prob(y)

    @jax.jit
    def draw(features: Array) -> tuple[Array, Array]:
        made = nnx.merge(graph_of(blueprint), params, rest)(features)
        return made.sample_and_log_prob(seed=jax.random.key(2), sample_shape=(20_000,))

    return log_prob, draw


FEATURES = jnp.array([[0.4, -1.0, 0.2]])


@pytest.mark.slow
def test_a_model_of_an_angle_integrates_to_one_and_draws_as_its_density(model):
    log_prob, draw = model
    y, scores = draw(FEATURES)
    assert np.max(np.abs(y[..., 0])) <= HALF_WIDTH
    errors = np.abs(log_prob(y[:, 0], FEATURES) - scores[:, 0])
    # rounding in single precision matters for a few draws far from the direction
    assert np.quantile(errors, 0.99) < 0.01
    middle = [(e[1:] + e[:-1]) / 2 for e in (EDGES, LINE)]
    grid = np.stack(np.meshgrid(*middle, indexing="ij"), axis=-1).reshape(-1, 2)
    mass = np.exp(log_prob(jnp.asarray(grid, jnp.float32), FEATURES))
    mass = mass.reshape(300, 300) * (EDGES[1] - EDGES[0]) * (LINE[1] - LINE[0])
    assert abs(mass.sum() - 1.0) < 0.01
    cells = mass.sum(axis=1).reshape(10, 30).sum(axis=1)
    counts = np.histogram(y[:, 0, 0], bins=EDGES[::30])[0] / len(y)
    assert np.ptp(cells) > 0.02
    np.testing.assert_allclose(counts, cells, atol=0.015)


def test_the_log_density_is_continuous_across_the_seam(model):
    log_prob, _ = model
    for line in (-1.0, 0.5):
        ends = jnp.array([[-HALF_WIDTH + 1e-4, line], [HALF_WIDTH - 1e-4, line]])
        below, above = log_prob(ends, FEATURES)
        assert abs(below - above) < 0.01 and below > -20.0
