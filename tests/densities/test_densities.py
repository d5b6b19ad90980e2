"""Every density: initial value, normalisation, agreement of draws and density, any dimension."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.scipy.stats import norm

import sbi_flows as sf
from sbi_flows.densities.base import Density, DensitySettings
from tests import cases

pytestmark = pytest.mark.promotes

CONTEXT_DIM = 3
CONTEXT = jnp.array([0.4, -1.0, 0.2])
EDGES = np.linspace(-12.0, 12.0, 401)
MIDDLE = (EDGES[1:] + EDGES[:-1]) / 2
GRID = jnp.asarray(np.stack(np.meshgrid(MIDDLE, MIDDLE, indexing="ij"), axis=-1).reshape(-1, 2))


def moved(key: jax.Array, weights: nnx.State) -> nnx.State:
    """Add noise to every weight, of a fifth of the size of random initial weights.

    With more noise the density is so sharp that no grid resolves it, and rounding of a draw in
    single precision changes its log density by 0.1 or more.
    """
    leaves, structure = jax.tree.flatten(weights)
    keys = jax.random.split(key, len(leaves))
    noise = [
        0.2 * jax.random.normal(k, leaf.shape) / np.sqrt(leaf.shape[-2] if leaf.ndim > 1 else 1)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, [a + b for a, b in zip(leaves, noise, strict=True)])


class Program:
    """A density in `dim` dimensions, as compiled functions of its weights."""

    def __init__(self, name: str, dim: int) -> None:
        density = cases.DENSITIES[name].build(jax.random.key(0), dim, CONTEXT_DIM)
        self.graph, self.initial = nnx.split(density)
        self.perturbed = moved(jax.random.key(1), self.initial)

    @functools.partial(jax.jit, static_argnums=0)
    def log_prob(self, weights, z, context):
        return nnx.merge(self.graph, weights)(context).log_prob(z)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def draw(self, weights, n, context):
        distribution = nnx.merge(self.graph, weights)(context)
        return distribution.sample_and_log_prob(seed=jax.random.key(2), sample_shape=(n,))

    @functools.partial(jax.jit, static_argnums=0)
    def loss(self, weights, key, z, context):
        return nnx.merge(self.graph, weights).loss(key, z, context)


@pytest.fixture(scope="module", params=cases.DENSITIES)
def plane(request):
    """A density in two dimensions."""
    return Program(request.param, 2)


@pytest.mark.slow
def test_the_start_is_standard_normal(plane):
    z = jax.random.normal(jax.random.key(3), (500, 2))
    exact = jnp.sum(norm.logpdf(z), axis=-1)
    started = plane.log_prob(plane.initial, z, jnp.tile(CONTEXT, (500, 1)))
    if "shift" in plane.initial:  # the components of a mixture have different initial means
        assert abs(np.mean(exact - started)) < 0.03
    else:
        np.testing.assert_allclose(started, exact, atol=1e-4)


@pytest.mark.slow
def test_integrates_to_one_and_draws_fall_where_the_density_is(plane):
    """Compare the masses of 16 cells from the density on a grid with those from draws."""
    log_prob = plane.log_prob(plane.perturbed, GRID, CONTEXT)
    assert log_prob.shape == (len(GRID),)
    mass = np.exp(np.asarray(log_prob)).reshape(400, 400) * (EDGES[1] - EDGES[0]) ** 2
    assert abs(mass.sum() - 1) < 0.01
    draws, scores = plane.draw(plane.perturbed, 20_000, CONTEXT)
    assert draws.shape == (20_000, 2)
    again = plane.log_prob(plane.perturbed, draws, CONTEXT)
    np.testing.assert_allclose(scores, again, rtol=1e-3, atol=2e-3)
    # the density differs from its initial value, or the test could not fail
    assert np.mean(scores - jnp.sum(norm.logpdf(draws), axis=-1)) > 0.03
    cuts = np.array([-12.0, -1.2, 0.0, 1.2, 12.0])
    counts = np.histogram2d(*np.asarray(draws).T, bins=[cuts, cuts])[0]
    cells = [np.searchsorted(cuts, MIDDLE) - 1] * 2
    expected = np.zeros((4, 4))
    np.add.at(expected, tuple(np.meshgrid(*cells, indexing="ij")), mass)
    assert np.sum(expected > 0.01) >= 4
    np.testing.assert_allclose(counts / 20_000, expected, atol=0.015)


def test_the_perturbed_density_depends_on_the_context(plane):
    z, contexts = jnp.ones((2, 2)), jnp.stack([CONTEXT, -CONTEXT])
    first, second = plane.log_prob(plane.perturbed, z, contexts)
    assert abs(first - second) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, 5])
@pytest.mark.parametrize("name", cases.DENSITIES)
def test_any_dimension_and_batches_of_contexts(name, dim):
    program = Program(name, dim)
    contexts = jax.random.normal(jax.random.key(4), (4, CONTEXT_DIM))
    draws, scores = program.draw(program.perturbed, 50, contexts)
    assert (draws.shape, scores.shape) == ((50, 4, dim), (50, 4))
    assert np.all(np.isfinite(scores))
    # the densities of rows with one context each are those of draws for each context
    rows = jnp.tile(contexts, (50, 1))
    again = program.log_prob(program.perturbed, draws.reshape(-1, dim), rows)
    np.testing.assert_allclose(again.reshape(50, 4), scores, rtol=1e-3, atol=5e-3)


def test_dropout_follows_the_key_and_is_off_without_one(plane):
    z, contexts = jnp.ones((8, 2)), jnp.tile(CONTEXT, (8, 1))
    plain = plane.loss(plane.perturbed, None, z, contexts)
    assert plain.shape == (8,)
    np.testing.assert_allclose(
        plain, -plane.log_prob(plane.perturbed, z, contexts), rtol=1e-4, atol=1e-4
    )
    first, same, other = (
        plane.loss(plane.perturbed, jax.random.key(seed), z, contexts) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, same)
    assert np.max(np.abs(first - plain)) > 1e-4
    assert np.max(np.abs(first - other)) > 1e-4


def test_extreme_inputs_give_finite_losses_and_gradients(plane):
    z = jnp.array([[1e6, -1e6], [-1e6, 1e6], [0.1, 1e6], [0.3, 0.2]])
    contexts = jnp.array([[1.0, 0.0, -1.0]] * 3 + [[1e3, -1e3, 0.0]])

    @jax.jit
    def compute(weights, z):
        total = lambda weights, z: jnp.sum(plane.loss(weights, None, z, contexts))  # noqa: E731
        return jax.value_and_grad(total, argnums=(0, 1))(weights, z)

    for leaf in jax.tree.leaves(compute(plane.perturbed, z)):
        assert np.all(np.isfinite(leaf))


def test_settings_are_frozen_hashable_descriptions():
    for settings in cases.DENSITIES.values():
        assert isinstance(settings, DensitySettings)
        assert isinstance(settings.build(jax.random.key(0), 2, CONTEXT_DIM), Density)
        with pytest.raises(AttributeError):
            settings.dropout = 0.5
    assert sf.NSF(bins=4) == sf.NSF(bins=4) != sf.NSF(bins=5)
    assert hash(sf.MAF()) == hash(sf.MAF())


@pytest.mark.parametrize(
    ("kind", "setting", "value", "message"),
    [
        (sf.NSF, "transforms", 0, "transforms: expected a whole number of at least 1, got 0"),
        (sf.MAF, "transforms", 2.5, "transforms: expected a whole number of at least 1, got 2.5"),
        (sf.NSF, "bins", 1, "bins: expected a whole number of at least 2, got 1"),
        (sf.NSF, "bound", 0.0, "bound: expected a positive number, got 0.0"),
        (sf.NSF, "hidden", (), r"hidden: expected a tuple of at least one width, got \(\)"),
        (sf.MAF, "hidden", [64, 64], r"hidden: expected a tuple of at least one width, got \[64"),
        (sf.MAF, "hidden", (64, 0), "hidden: expected a whole number of at least 1, got 0"),
        (sf.NSF, "context_width", -1, "context_width: expected a whole number of at least 0"),
        (sf.NSF, "context_blocks", -1, "context_blocks: expected a whole number of at least 0"),
        (sf.NSF, "dropout", 1.0, r"dropout: expected a number in \[0, 1\), got 1.0"),
        (sf.MAF, "dropout", float("nan"), r"dropout: expected a number in \[0, 1\), got nan"),
        (sf.GaussianMixture, "components", 0, "components: expected a whole number of at least 1"),
        (sf.GaussianMixture, "width", True, "width: expected a whole number of at least 1"),
        (sf.GaussianMixture, "blocks", -1, "blocks: expected a whole number of at least 0"),
        (sf.GaussianMixture, "dropout", -0.1, r"dropout: expected a number in \[0, 1\), got -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(kind, setting, value, message):
    with pytest.raises(ValueError, match=message):
        cases.unchecked(kind, **{setting: value})


def test_depth_adds_layers():
    """The number of weights is proportional to the number of transforms."""

    def size(transforms: int) -> int:
        density = sf.MAF(transforms=transforms, hidden=(8,), context_width=0)
        model = nnx.eval_shape(lambda: density.build(jax.random.key(0), 2, CONTEXT_DIM))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))

    assert size(4) == 2 * size(2) > 0
