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

from sbi_flows.bijectors import Permutation, RationalQuadraticSpline, TruncatedAutoregression
from sbi_flows.prior_maps import HALF_WIDTH
from tests import cases

SUPPORTS = {f"support of {name}": cases.support(name) for name in cases.PRIORS}
ALL = cases.BIJECTORS | SUPPORTS
DTYPES = ("float32", "float64")
# distrax and numpyro promote ranks inside the maps to a support
MARKS = {name: [pytest.mark.promotes] for name in SUPPORTS} | {"spline": [pytest.mark.newest]}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One bijector at some points, in single precision (`low`) and in double precision."""

    case: cases.BijectorCase
    low: dict[str, np.ndarray]
    high: dict[str, np.ndarray]
    jacobian: np.ndarray  # its log absolute determinant


def _both_ways(bijector: distrax.Bijector, x: jax.Array) -> dict[str, jax.Array]:
    y, log_det = bijector.forward_and_log_det(x)
    back, back_log_det = bijector.inverse_and_log_det(y)
    return {"x": x, "y": y, "log_det": log_det, "back": back, "back_log_det": back_log_det}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=MARKS.get(name, [])) for name in ALL]
)
def measured(request) -> Measured:
    case = ALL[request.param]
    dim = case.dims[0]
    params = case.params(jax.random.key(0), dim)
    shape, width = (16, dim), case.width
    x = jax.random.uniform(jax.random.key(1), shape, minval=-width, maxval=width)
    low = jax.jit(lambda params, x: _both_ways(case.build(params, dim), x))(params, x)
    with jax.enable_x64(True):

        @jax.jit
        def compute(params: Any, x: jax.Array) -> tuple:
            bijector = case.build(params, dim)
            both = _both_ways(bijector, x)
            if request.param in SUPPORTS:
                rows = jnp.arange(bijector.forward(x[0]).size) if case.free is None else case.free
                jacobian = jax.vmap(jax.jacobian(bijector.forward))(x)[:, jnp.asarray(rows)]
            else:  # that of the inverse compiles faster: it is one pass
                jacobian = jnp.linalg.inv(jax.vmap(jax.jacobian(bijector.inverse))(both["y"]))
            return both, jnp.linalg.slogdet(jacobian)[1]

        case.params(jax.random.key(0), dim)
        precise = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, x))
        high, jacobian = jax.tree.map(np.asarray, compute(*precise))
    return Measured(case, jax.tree.map(np.asarray, low), high, jacobian)


def test_the_inverse_undoes_the_forward_map(measured):
    for result, tolerance in ((measured.low, 3e-3), (measured.high, 1e-7)):
        np.testing.assert_allclose(result["back"], result["x"], atol=tolerance)
        np.testing.assert_allclose(result["back_log_det"], -result["log_det"], atol=tolerance)


def test_the_log_determinant_is_that_of_the_jacobian(measured):
    np.testing.assert_allclose(measured.high["log_det"], measured.jacobian, atol=1e-7)


def test_both_precisions_agree_and_keep_their_dtype(measured):
    for name, low in measured.low.items():
        high = measured.high[name]
        assert (low.dtype, high.dtype) == (np.float32, np.float64)
        assert low.shape == high.shape
        np.testing.assert_allclose(low, high, rtol=1e-3, atol=3e-3)


def test_the_points_are_moved(measured):
    """Were a bijector the identity, the tests above could not fail."""
    x, y = measured.high["x"], measured.high["y"]
    assert x.shape != y.shape or np.max(np.abs(x - y)) > 0.05


EXTREMES = ((1e6, -1e6, 1e6), (-1e6, 1e6, -1e6), (1e6, 0.3, -1e6), (0.1, -1e6, 0.2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", cases.BIJECTORS)
def test_extreme_inputs_give_finite_values_and_gradients(name, dtype):
    case = cases.BIJECTORS[name]
    with jax.enable_x64(dtype == "float64"):
        params = case.params(jax.random.key(0), 3)

        @jax.jit
        @jax.vmap
        def compute(x: jax.Array) -> tuple:
            def total(params: Any, x: jax.Array) -> tuple:
                bijector = case.build(params, 3)
                both = bijector.forward_and_log_det(x), bijector.inverse_and_log_det(x)
                return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(both)), both

            gradients, values = jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)
            return values, gradients

        values, gradients = compute(jnp.asarray(EXTREMES))
        for leaf in jax.tree.leaves((values, gradients)):
            assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("name", cases.BIJECTORS)
@hypothesis.settings(max_examples=3)
@hypothesis.given(data=strategies.data())
def test_any_batch_shape(name, data):
    """A batch is its rows one by one: jit and vmap over them give the same."""
    case = cases.BIJECTORS[name]
    dim = data.draw(strategies.sampled_from(case.dims), label="dim")
    batch = tuple(data.draw(strategies.lists(strategies.integers(1, 4), max_size=2), label="batch"))
    params = case.params(jax.random.key(0), dim)
    x = jax.random.normal(jax.random.key(2), (*batch, dim))

    @jax.jit
    def compute(x: jax.Array) -> tuple:
        bijector = case.build(params, dim)
        rows = jax.vmap(bijector.forward_and_log_det)(x.reshape(-1, dim))
        out = bijector.forward_and_log_det(x)
        return out, rows

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


@pytest.mark.parametrize("order", [(0, 0), (1, 2), (0, 1, 3)])
def test_no_permutation_is_refused(order):
    with pytest.raises(ValueError, match="expected a permutation of"):
        Permutation(order)


class TestTruncated:
    def test_noise_of_any_size_stays_in_the_box(self):
        case = cases.BIJECTORS["truncated normal"]
        bijector = case.build(case.params(jax.random.key(0), 3), 3)
        noise = jnp.concatenate(
            [20 * jax.random.normal(jax.random.key(1), (200, 3)), jnp.asarray(EXTREMES)]
        )
        assert np.max(np.abs(bijector.forward(noise))) <= np.float32(HALF_WIDTH)

    def test_a_tiny_scale_is_affine_and_a_large_one_the_uniform_prior(self):
        noise, zeros = jnp.linspace(-2.0, 2.0, 9)[:, None], jnp.zeros((1, 1))
        narrow = TruncatedAutoregression(jnp.full(1, 0.4), zeros, jnp.full(1, -4.0), (True,))
        expected = 0.4 + np.exp(-4.0) * noise
        np.testing.assert_allclose(narrow.forward(noise), expected, atol=1e-6)
        wide = TruncatedAutoregression(jnp.zeros(1), zeros, jnp.full(1, 5.0), (True,))
        uniform = HALF_WIDTH * (2 * jax.scipy.stats.norm.cdf(noise) - 1)
        np.testing.assert_allclose(wide.forward(noise), uniform, atol=1e-3)

    def test_its_density_is_that_of_the_noise(self):
        """`log_prob` takes no quantile; both are the same within 3 standard deviations."""
        for name in ("truncated normal", "truncated normal, partly"):
            case = cases.BIJECTORS[name]
            bijector = case.build(case.params(jax.random.key(0), 3), 3)
            y = bijector.forward(jax.random.uniform(jax.random.key(1), (50, 3), minval=-3, maxval=3))
            noise, log_det = bijector.inverse_and_log_det(y)
            expected = jnp.sum(jax.scipy.stats.norm.logpdf(noise), axis=-1) + log_det
            np.testing.assert_allclose(bijector.log_prob(y), expected, atol=2e-3)

    def test_an_entry_is_normal_around_the_entries_before_it(self):
        chain = jnp.array([[9.0, 0.5], [9.0, 9.0]])  # only the entry above the diagonal counts
        mean, log_scale = jnp.array([0.2, 0.1]), jnp.log(jnp.array([0.3, 0.2]))
        bijector = TruncatedAutoregression(mean, chain, log_scale, (False, False))
        y = bijector.forward(jnp.array([1.0, -2.0]))
        np.testing.assert_allclose(y, [0.5, 0.1 + 0.5 * 0.5 - 0.4], rtol=1e-5)


@pytest.mark.promotes
def test_outside_the_support_the_density_is_zero():
    case = SUPPORTS["support of uniform"]
    outside = jnp.array([[0.0, 9.0], [-2.5, 0.0], [0.0, jnp.nan]])
    _, log_det = case.build((), 2).inverse_and_log_det(outside)
    np.testing.assert_array_equal(log_det, -np.inf)


def test_every_bijector_is_one_of_distrax():
    for case in cases.BIJECTORS.values():
        bijector = case.build(case.params(jax.random.key(0), 2), 2)
        assert isinstance(bijector, distrax.Bijector)
        assert bijector.event_ndims_in == bijector.event_ndims_out == 1
