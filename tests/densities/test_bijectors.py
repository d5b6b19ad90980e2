"""Every bijector: inverse, Jacobian, extreme inputs, both precisions, jit, vmap, grad, shapes."""

import dataclasses
from typing import Any

import distrax
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from sbi_flows.densities.bijectors import RationalQuadraticSpline, TruncatedAutoregression
from sbi_flows.prior.maps import HALF_WIDTH
from tests import cases

SUPPORTS = {f"support of {name}": cases.support(name) for name in cases.PRIORS}
ALL = cases.BIJECTORS | SUPPORTS
# distrax and numpyro promote ranks inside the maps to a support
MARKS = {name: [pytest.mark.promotes] for name in SUPPORTS} | {"spline": [pytest.mark.newest]}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Values of one bijector in double precision, with log |det| of its Jacobian."""

    name: str
    x: np.ndarray
    y: np.ndarray
    log_det: np.ndarray
    back: np.ndarray
    back_log_det: np.ndarray
    jacobian: np.ndarray


def _both_ways(bijector: distrax.Bijector, x: jax.Array) -> tuple[jax.Array, ...]:
    return *bijector.forward_and_log_det(x), *bijector.inverse_and_log_det(bijector.forward(x))


def _jacobian(case: cases.BijectorCase, bijector: distrax.Bijector, x: jax.Array) -> jax.Array:
    if case in SUPPORTS.values():
        matrices = jax.vmap(jax.jacobian(bijector.forward))(x)
        free = range(matrices.shape[1]) if case.free is None else case.free
        return jnp.linalg.slogdet(matrices[:, jnp.asarray(free)])[1]
    # the Jacobian of the inverse compiles faster, as the inverse is one pass
    inverse = jax.vmap(jax.jacobian(bijector.inverse))(bijector.forward(x))
    return -jnp.linalg.slogdet(inverse)[1]


def _points(case: cases.BijectorCase) -> jax.Array:
    shape = (16, case.dims[0])
    return jax.random.uniform(jax.random.key(1), shape, minval=-case.width, maxval=case.width)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=MARKS.get(name, [])) for name in ALL]
)
def measured(request) -> Measured:
    case = ALL[request.param]
    dim = case.dims[0]
    with jax.enable_x64(True):
        params, x = case.params(jax.random.key(0), dim), _points(case)

        @jax.jit
        def compute(params: Any, x: jax.Array) -> tuple:
            bijector = case.build(params, dim)
            return *_both_ways(bijector, x), _jacobian(case, bijector, x)

        outputs = [np.asarray(leaf) for leaf in (x, *compute(params, x))]
    assert all(leaf.dtype == np.float64 for leaf in outputs)
    return Measured(request.param, *outputs)


@pytest.mark.slow
def test_the_inverse_undoes_the_forward_map(measured):
    np.testing.assert_allclose(measured.back, measured.x, atol=1e-7)
    np.testing.assert_allclose(measured.back_log_det, -measured.log_det, atol=1e-7)
    assert measured.log_det.shape == (16,)


def test_the_log_determinant_is_that_of_the_jacobian(measured):
    np.testing.assert_allclose(measured.log_det, measured.jacobian, atol=1e-7)


def test_the_points_are_moved(measured):
    """The tests above could not fail for the identity."""
    x, y = measured.x, measured.y
    moved = x.shape != y.shape or np.max(np.abs(x - y)) > 0.05
    assert moved


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.BIJECTORS)
def test_single_precision_is_close_to_double(name):
    """The tests of the priors check the maps to supports."""
    case = cases.BIJECTORS[name]
    params, x = case.params(jax.random.key(0), 3), _points(case)
    compute = jax.jit(lambda params, x: _both_ways(case.build(params, 3), x))
    low = compute(params, x)
    with jax.enable_x64(True):
        as_double = lambda leaf: jnp.asarray(leaf, jnp.float64)  # noqa: E731
        high = compute(*jax.tree.map(as_double, (params, x)))
    for a, b in zip(low, high, strict=True):
        assert (a.dtype, b.dtype) == (jnp.float32, jnp.float64)
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=3e-3)
    np.testing.assert_allclose(low[2], x, atol=3e-3)


EXTREMES = ((1e6, -1e6, 1e6), (-1e6, 1e6, -1e6), (1e6, 0.3, -1e6), (0.1, -1e6, 0.2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "direction"),
    # the inverse is the one that training differentiates
    [("float32", "forward"), ("float32", "inverse"), ("float64", "inverse")],
)
@pytest.mark.parametrize("name", cases.BIJECTORS)
def test_extreme_inputs_give_finite_values_and_gradients(name, dtype, direction):
    case = cases.BIJECTORS[name]
    with jax.enable_x64(dtype == "float64"):
        params = case.params(jax.random.key(0), 3)

        @jax.jit
        @jax.vmap
        def compute(x: jax.Array) -> tuple:
            def total(params: Any, x: jax.Array) -> tuple:
                out, log_det = getattr(case.build(params, 3), f"{direction}_and_log_det")(x)
                return jnp.sum(out) + log_det, (out, log_det)

            gradients, values = jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)
            return values, gradients

        values, gradients = compute(jnp.asarray(EXTREMES))
        for leaf in jax.tree.leaves((values, gradients)):
            assert np.all(np.isfinite(leaf))


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.BIJECTORS)
@hypothesis.settings(max_examples=3)
@hypothesis.given(data=strategies.data())
def test_any_batch_shape(name, data):
    """A batch gives the same as its rows one by one, by jit and vmap."""
    case = cases.BIJECTORS[name]
    dim = data.draw(strategies.sampled_from(case.dims), label="dim")
    batch = tuple(data.draw(strategies.lists(strategies.integers(1, 4), max_size=2), label="batch"))
    params = case.params(jax.random.key(0), dim)
    x = jax.random.normal(jax.random.key(2), (*batch, dim))

    @jax.jit
    def compute(x: jax.Array) -> tuple:
        bijector = case.build(params, dim)
        rows = jax.vmap(bijector.inverse_and_log_det)(x.reshape(-1, dim))
        return bijector.inverse_and_log_det(x), rows

    (y, log_det), (y_rows, log_det_rows) = compute(x)
    assert y.shape == (*batch, dim)
    assert log_det.shape == batch
    np.testing.assert_allclose(y.reshape(-1, dim), y_rows, atol=1e-5)
    np.testing.assert_allclose(log_det.reshape(-1), log_det_rows, atol=1e-5)


class TestSpline:
    def test_zero_parameters_are_the_identity(self):
        x = jnp.linspace(-7.0, 7.0, 50)
        y, log_det = RationalQuadraticSpline(jnp.zeros((17, 50)), 4.0).forward_and_log_det(x)
        np.testing.assert_allclose(y, x, atol=1e-5)
        np.testing.assert_allclose(log_det, 0.0, atol=1e-5)

    def test_increasing_and_the_identity_outside(self):
        params = 2 * jax.random.normal(jax.random.key(0), (17, 1))
        spline = RationalQuadraticSpline(jnp.tile(params, (1, 400)), 4.0)
        x = jnp.linspace(-6.0, 6.0, 400)
        y = spline.forward(x)
        assert np.all(np.diff(y) > 0)
        outside = np.abs(x) >= 4
        np.testing.assert_array_equal(np.asarray(y)[outside], np.asarray(x)[outside])
        assert np.max(np.abs(y - x)) > 0.5

    def test_very_large_parameters_stay_finite(self):
        params = 1e4 * jax.random.normal(jax.random.key(0), (17, 30))
        x = jnp.linspace(-3.9, 3.9, 30)

        @jax.jit
        def total(params: jax.Array, x: jax.Array) -> jax.Array:
            spline = RationalQuadraticSpline(params, 4.0)
            out = spline.forward_and_log_det(x), spline.inverse_and_log_det(x)
            return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out))

        value, gradients = jax.value_and_grad(total, argnums=(0, 1))(params, x)
        assert all(np.all(np.isfinite(leaf)) for leaf in (value, *gradients))

    @pytest.mark.parametrize("rows", [2, 15, 18])
    def test_a_first_axis_of_no_spline_is_refused(self, rows):
        with pytest.raises(ValueError, match=r"first axis of 3 K - 1 with K >= 2"):
            RationalQuadraticSpline(jnp.zeros((rows, 2)))


class TestTruncated:
    def test_noise_of_any_size_stays_in_the_box(self):
        case = cases.BIJECTORS["truncated normal"]
        bijector = case.build(case.params(jax.random.key(0), 3), 3)
        noise = jnp.concatenate(
            [20 * jax.random.normal(jax.random.key(1), (200, 3)), jnp.asarray(EXTREMES)]
        )
        y = np.asarray(bijector.forward(noise))
        assert np.all(np.isfinite(y))
        bounded = [0, 2]  # the entry between them fills R
        assert np.max(np.abs(y[:, bounded])) <= np.float32(HALF_WIDTH)
        assert np.max(np.abs(y[:, 1])) > 1e3

    def test_a_tiny_scale_is_affine_and_a_large_one_the_uniform_prior(self):
        noise, zeros = jnp.linspace(-2.0, 2.0, 9)[:, None], jnp.zeros((1, 1))
        narrow = TruncatedAutoregression(jnp.full(1, 0.4), zeros, jnp.full(1, -4.0), (True,))
        expected = 0.4 + np.exp(-4.0) * noise
        np.testing.assert_allclose(narrow.forward(noise), expected, atol=1e-6)
        wide = TruncatedAutoregression(jnp.zeros(1), zeros, jnp.full(1, 5.0), (True,))
        uniform = HALF_WIDTH * (2 * jax.scipy.stats.norm.cdf(noise) - 1)
        np.testing.assert_allclose(wide.forward(noise), uniform, atol=1e-3)

    @pytest.mark.parametrize("mean", [0.0, 1.9, 3.0])
    def test_far_tails_come_back_in_order(self, mean):
        """With the mean outside the box, the straight line of a tail starts off the diagonal."""
        narrow = TruncatedAutoregression(
            jnp.full(1, mean), jnp.zeros((1, 1)), jnp.log(jnp.full(1, 0.1)), (True,)
        )
        noise = jnp.linspace(-9.0, 6.0, 61)[:, None]
        y, back = narrow.forward(noise), narrow.inverse(narrow.forward(noise))
        assert np.all(np.diff(y[:, 0]) >= 0)
        inside = np.abs(y) < HALF_WIDTH - 1e-4
        np.testing.assert_allclose(back[inside], noise[inside], atol=0.02)

    def test_its_density_is_that_of_the_noise(self):
        """`log_prob` computes no quantile; both agree within 3 standard deviations."""
        case = cases.BIJECTORS["truncated normal"]
        bijector = case.build(case.params(jax.random.key(0), 3), 3)
        drawn = jax.random.uniform(jax.random.key(1), (16, 3), minval=-3, maxval=3)
        y = bijector.forward(drawn)
        noise, log_det = bijector.inverse_and_log_det(y)
        expected = jnp.sum(jax.scipy.stats.norm.logpdf(noise), axis=-1) + log_det
        np.testing.assert_allclose(bijector.log_prob(y), expected, atol=2e-3)

    def test_an_entry_is_normal_around_the_entries_before_it(self):
        chain = jnp.array([[9.0, 0.5], [9.0, 9.0]])  # only the entry above the diagonal counts
        mean, log_scale = jnp.array([0.2, 0.1]), jnp.log(jnp.array([0.3, 0.2]))
        bijector = TruncatedAutoregression(mean, chain, log_scale, (False, False))
        y = bijector.forward(jnp.array([1.0, -2.0]))
        np.testing.assert_allclose(y, [0.5, 0.1 + 0.5 * 0.5 - 0.4], rtol=1e-5)


def test_every_bijector_is_one_of_distrax():
    for case in cases.BIJECTORS.values():
        bijector = case.build(case.params(jax.random.key(0), 2), 2)
        assert isinstance(bijector, distrax.Bijector)
        assert bijector.event_ndims_in == bijector.event_ndims_out == 1
