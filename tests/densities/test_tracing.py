"""Every model inside JAX: jit, grad, vmap and scan of its density and its draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sbi_flows as sf
from sbi_flows.densities.conditional import Blueprint, graph_of, initial_weights
from sbi_flows.densities.distilled import Distilled
from sbi_flows.densities.sizes import Sizes
from tests.cases import DENSITIES, perturbed

pytestmark = pytest.mark.promotes

FILM = sf.Film(width=8, blocks=1, frequencies=2)
FEW_STEPS = sf.Solver(steps=4)
MATCHING = {"network": FILM, "solver": FEW_STEPS}
ALL = DENSITIES | {
    "CNF": sf.CNF(network=FILM, solver=FEW_STEPS),
    "flow matching": sf.FlowMatching(
        network=FILM, solver=sf.Solver(rtol=1e-7, atol=1e-7), sampler=None
    ),
    "diffusion": sf.Diffusion(**MATCHING, sampler=sf.Ancestral(steps=2)),
    "distilled": Distilled(teacher=sf.Diffusion(**MATCHING)),
}
# these differ from another case in their layers alone; the distilled density is the diffusion's
LIKE_ANOTHER = {"coupling NSF", "NSF without trunk", "coupling MAF", "distilled"}
CASES = [
    pytest.param(name, marks=pytest.mark.slow) if name in LIKE_ANOTHER else name for name in ALL
]
BOUNDED, FEATURES, ROWS = (True, False), 3, 4


class Traced:
    """A model with two parameters, away from its initial weights, in double precision."""

    def __init__(self, density) -> None:
        sizes = Sizes(BOUNDED, jax.tree.structure(0), ((FEATURES,),))
        self.blueprint = Blueprint(density, None, sizes)
        make = jax.jit(lambda key: initial_weights(self.blueprint, key, None))
        self.weights = perturbed(jax.random.key(1), make(jax.random.key(0)), 0.1)
        self.y = jax.random.uniform(jax.random.key(2), (ROWS, 2), minval=-1.5, maxval=1.5)
        self.features = jax.random.normal(jax.random.key(3), (ROWS, FEATURES))

    def distribution(self, weights, features):
        return nnx.merge(graph_of(self.blueprint), *weights)(features)

    def log_prob(self, weights, y, features):
        """Log density () of one point (2,) given one row of features."""
        return self.distribution(weights, features[None]).log_prob(y[None])[0]

    def draw(self, weights, key, features):
        """Two draws (2, 2) given one row of features."""
        return self.distribution(weights, features[None]).sample(seed=key, sample_shape=2)[:, 0]

    def rows(self):
        return self.weights, self.y, self.features


@pytest.fixture(scope="module", params=CASES)
def traced(request):
    with jax.enable_x64(True):
        yield Traced(ALL[request.param])


@pytest.mark.slow
def test_the_gradient_is_that_of_central_differences(traced):
    """With respect to the parameters and to the features."""
    weights, y, features = traced.rows()
    step, log_prob = 1e-4, functools.partial(traced.log_prob, weights)

    @jax.jit
    def compute(y, features):
        value, gradients = jax.value_and_grad(log_prob, argnums=(0, 1))(y, features)
        shifts = step * jnp.concatenate([jnp.eye(2 + FEATURES), -jnp.eye(2 + FEATURES)])
        moved = jax.vmap(lambda shift: log_prob(y + shift[:2], features + shift[2:]))(shifts)
        above, below = jnp.split(moved, 2)
        return value, jnp.concatenate(gradients), (above - below) / (2 * step)

    for row in range(2):
        value, gradient, expected = compute(y[row], features[row])
        assert gradient.dtype == jnp.float64
        assert np.isfinite(value)
        assert np.all(np.abs(gradient) > 1e-8)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_batch_is_its_rows_by_vmap_and_by_scan(traced):
    weights, y, features = traced.rows()

    @jax.jit
    def compute(weights, y, features):
        def step(carry, row):
            log_prob = traced.log_prob(weights, *row)
            return carry + log_prob, log_prob

        total, scanned = jax.lax.scan(step, jnp.zeros(()), (y, features))
        mapped = jax.vmap(functools.partial(traced.log_prob, weights))(y, features)
        return traced.distribution(weights, features).log_prob(y), mapped, scanned, total

    batch, mapped, scanned, total = compute(weights, y, features)
    assert np.all(np.isfinite(batch))
    assert np.std(batch) > 1e-3
    np.testing.assert_allclose(mapped, batch, rtol=1e-8)
    np.testing.assert_allclose(scanned, batch, rtol=1e-8)
    assert float(total) == pytest.approx(float(np.sum(batch)))


@pytest.mark.slow
def test_draws_follow_keys_by_vmap_and_by_scan(traced):
    weights, _, features = traced.rows()
    keys = jax.random.split(jax.random.key(4), ROWS)

    @jax.jit
    def compute(weights, keys, features):
        draw = functools.partial(traced.draw, weights)
        scanned = jax.lax.scan(lambda carry, row: (carry, draw(*row)), 0, (keys, features))[1]
        return jax.vmap(draw)(keys, features), scanned, draw(keys[0], features[0])

    mapped, scanned, single = compute(weights, keys, features)
    assert mapped.shape == (ROWS, 2, 2)
    assert np.all(np.isfinite(mapped))
    np.testing.assert_allclose(scanned, mapped, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(single, mapped[0], rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_no_program_calls_back_to_the_host(traced):
    weights, y, features = traced.rows()
    programs = (
        jax.make_jaxpr(jax.grad(traced.log_prob, argnums=(1, 2)))(weights, y[0], features[0]),
        jax.make_jaxpr(traced.draw)(weights, jax.random.key(0), features[0]),
    )
    for program in programs:
        assert "callback" not in str(program)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [sf.FlowMatching, sf.CNF, sf.Diffusion],
)
def test_a_solve_that_fails_is_nan_inside_a_trace(kind):
    solver = sf.Solver(max_steps=1, rtol=1e-9, atol=1e-9)
    drawn = {} if kind is sf.CNF else {"sampler": None}
    traced = Traced(kind(network=FILM, solver=solver, **drawn))
    weights, y, features = traced.rows()
    value, gradient = jax.jit(jax.value_and_grad(traced.log_prob, argnums=1))(
        weights, y[0], features[0]
    )
    assert np.isnan(value)
    assert gradient.shape == (2,)
    assert np.all(np.isnan(jax.jit(traced.draw)(weights, jax.random.key(0), features[0])))
