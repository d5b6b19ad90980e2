"""Features stay finite and ordered for constants, counts, heavy tails and huge values."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as arrays

from sbi_flows.observations.standardise import fit_standardiser, flatten_rows, unflatten_rows

RNG = np.random.default_rng(0)
FEATURES = {
    "normal": RNG.normal(5.0, 2.0, (500, 1)),
    "constant": np.full((500, 1), 3.0),
    "constant zero": np.zeros((500, 1)),
    "integer": RNG.poisson(4.0, (500, 1)),
    "sparse counts": (RNG.uniform(size=(500, 1)) < 0.05).astype(int),
    "boolean": RNG.uniform(size=(500, 1)) < 0.5,
    "Cauchy": RNG.standard_cauchy((500, 1)),
    "log-normal": np.exp(10 * RNG.normal(size=(500, 1))),
    "huge": 1e37 * RNG.normal(size=(500, 1)),
    "tiny": 1e-25 * RNG.normal(size=(500, 1)),
    "nearly constant": 1e6 + 1e-3 * RNG.normal(size=(500, 1)),
    "one outlier": np.append(RNG.normal(size=(499, 1)), [[1e30]], axis=0),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_are_finite_and_of_moderate_size(name):
    x = jnp.asarray(FEATURES[name])
    features = fit_standardiser(x)(x)
    assert features.shape == (500, 1)
    assert features.dtype == jnp.float32
    assert np.all(np.isfinite(features))
    assert np.max(np.abs(features)) < 100


@pytest.mark.parametrize("name", [n for n in FEATURES if "constant" not in n])
def test_the_order_is_kept(name):
    """Monotone: nothing is cut off, not even beyond the rows that it was fitted to."""
    x = np.sort(np.asarray(FEATURES[name], np.float32), axis=0)
    standardise = fit_standardiser(jnp.asarray(FEATURES[name]))
    features = np.asarray(standardise(jnp.asarray(x)))
    assert np.all(np.diff(features[:, 0]) >= 0)
    assert features[-1, 0] - features[0, 0] > 1
    beyond = standardise(jnp.asarray([x[-1] + 5 * (x[-1] - x[0]).clip(max=1e36)]))
    assert beyond[0, 0] > features[-1, 0]


def test_normal_features_become_standard():
    x = jnp.asarray(FEATURES["normal"])
    features = fit_standardiser(x)(x)
    assert abs(np.mean(features)) < 0.1
    assert abs(np.std(features) - 1) < 0.1


def test_within_three_scales_the_map_is_linear():
    standardise = fit_standardiser(jnp.asarray(FEATURES["normal"]))
    scales = jnp.array([[-2.9], [-1.0], [0.5], [2.9]])
    x = standardise.center[None] + standardise.scale[None] * scales
    np.testing.assert_allclose(standardise(x), scales, rtol=1e-4)


def test_logarithms_are_taken_of_what_is_positive_and_less_skew_so():
    columns = {
        "log-normal": np.exp(RNG.normal(size=(2_000, 1))),
        "gamma with zeros": np.maximum(RNG.gamma(1.0, size=(2_000, 1)) - 0.5, 0.0),
        "far from zero": RNG.normal(100.0, 1.0, size=(2_000, 1)),
        "negative": -np.exp(RNG.normal(size=(2_000, 1))),
        # one array is treated alike throughout
        "series": np.exp(RNG.normal(size=(2_000, 1)) * [0.01, 1.0, 1.0]),
    }
    x = {name: jnp.asarray(column, jnp.float32) for name, column in columns.items()}
    standardise = fit_standardiser(x)
    taken = unflatten_rows(
        standardise.floor[None] > 0, jax.tree.structure(x), ((1,), (1,), (1,), (1,), (3,))
    )
    assert {name: set(np.ravel(value)) for name, value in taken.items()} == {
        name: {name in ("log-normal", "series")} for name in columns
    }
    standardise, x = fit_standardiser(x["log-normal"]), x["log-normal"]
    features = standardise(x)
    residual = features - (np.log(x) - float(standardise.center[0])) / float(standardise.scale[0])
    assert np.max(np.abs(np.where(np.abs(features) < 3, residual, 0.0))) < 1e-4
    # zero and less, which no training row held, are still told apart
    beyond = standardise(jnp.array([[0.1], [1e-3], [0.0], [-1.0]]))
    assert np.all(np.diff(beyond[:, 0]) < 0)


def test_columns_of_a_set_take_logarithms_each_on_its_own():
    times, choices = np.exp(RNG.normal(size=(300, 20))), RNG.integers(0, 2, size=(300, 20))
    x = jnp.asarray(np.stack([times, choices], axis=-1), jnp.float32)
    floor = np.asarray(fit_standardiser(x, ((0,),)).floor).reshape(20, 2)
    assert np.all(floor[:, 0] == 0.5 * x[..., 0].min()) and np.all(floor[:, 1] == 0.0)
    # without shared axes, no entry of the array takes them
    assert np.all(np.asarray(fit_standardiser(x).floor) == 0.0)


@pytest.mark.parametrize("name", FEATURES)
def test_the_inverse_gives_the_observations_back(name):
    x = jnp.asarray(FEATURES[name], jnp.float32)
    standardise = fit_standardiser(x)
    features = standardise(x)
    back = standardise.inverse(features)
    # to within what the features themselves resolve
    again = standardise(back)
    np.testing.assert_allclose(again, features, rtol=1e-3, atol=1e-3)
    moderate = np.abs(np.asarray(features)) < 10
    size = np.abs(np.asarray(x)) + np.asarray(standardise.scale)
    error = np.abs(np.asarray(back) - np.asarray(x, np.float32)) / size
    assert np.max(np.where(moderate, error, 0.0)) < 1e-3


def test_a_constant_feature_becomes_zero_and_shows_when_it_differs():
    standardise = fit_standardiser(jnp.asarray(FEATURES["constant"]))
    assert float(standardise.scale[0]) == 1.0
    features = standardise(jnp.array([[3.0], [4.0]]))
    np.testing.assert_allclose(features, [[0.0], [1.0]])


@hypothesis.given(
    arrays.arrays(
        np.float32,
        (7, 2),
        elements=strategies.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    )
)
def test_any_finite_rows_give_finite_features(x):
    features = fit_standardiser(jnp.asarray(x))(jnp.asarray(x))
    assert np.all(np.isfinite(features))


def test_the_largest_numbers_over_a_small_scale_are_finite():
    standardise = fit_standardiser(jnp.asarray(FEATURES["tiny"]))
    features = standardise(jnp.array([[-3e38], [0.0], [3e38]]))
    assert np.all(np.isfinite(features))
    assert np.all(np.diff(features[:, 0]) > 0)


def test_gradients_are_finite_far_outside():
    standardise = fit_standardiser(jnp.asarray(FEATURES["normal"]))
    gradient = jax.grad(lambda x: jnp.sum(standardise(x)))(jnp.array([[1e6], [-1e6], [5.0]]))
    assert np.all(np.isfinite(gradient))
    assert np.all(gradient > 0)


def test_leaves_are_joined_and_split_again():
    x = {
        "image": jnp.arange(12.0).reshape(2, 2, 3),
        "count": jnp.array([4, 5]),
        "flag": jnp.array([[True], [False]]),
    }
    rows = flatten_rows(x)
    assert rows.shape == (2, 8)
    shapes = tuple(leaf.shape[1:] for leaf in jax.tree.leaves(x))
    back = unflatten_rows(rows, jax.tree.structure(x), shapes)
    assert jax.tree.structure(back) == jax.tree.structure(x)
    for name, leaf in x.items():
        assert back[name].shape == leaf.shape
        np.testing.assert_array_equal(back[name], leaf)


def test_the_log_determinant_is_that_of_the_jacobian():
    names = ("normal", "Cauchy", "log-normal", "constant")
    x = tuple(jnp.asarray(FEATURES[name], float) for name in names)
    standardise = fit_standardiser(x)
    assert standardise.floor[2] > 0  # a logarithm is taken
    # ordinary rows, tails, and a value below the floor of the logarithm
    last = (5.0, 1e4, 0.5 * float(standardise.floor[2]), 3.0)
    rows = tuple(jnp.append(a[:20], v)[:, None] for a, v in zip(x, last, strict=True))

    def features(row):
        return standardise(tuple(row.reshape(4, 1, 1)))[0]

    jacobians = jax.vmap(jax.jacobian(features))(flatten_rows(rows))
    np.testing.assert_allclose(
        standardise.log_det(rows), jnp.linalg.slogdet(jacobians)[1], rtol=1e-4, atol=1e-3
    )


def test_the_log_determinant_leaves_missing_entries_out_and_counts_the_origin():
    x = 2.45e6 + RNG.normal(0.0, 1e-3, (400, 2))  # single precision cannot represent these
    standardise = fit_standardiser(x)
    assert standardise.origin is not None
    spread = float(np.mean(np.log(np.subtract(*np.quantile(x, [0.75, 0.25], axis=0)) / 1.349)))
    near = np.median(x, axis=0)[None]
    np.testing.assert_allclose(standardise.log_det(near), -2 * spread, rtol=1e-3)
    gaps = jnp.asarray(FEATURES["normal"] * np.ones(2)).at[0].set(jnp.asarray([1.0, jnp.nan]))
    standardise = fit_standardiser(gaps, has_missing=True)
    one, two = standardise.log_det(jnp.asarray([[5.0, jnp.nan], [5.0, 5.0]]))
    np.testing.assert_allclose(one, -jnp.log(standardise.scale[0]), rtol=1e-5)
    np.testing.assert_allclose(two, -jnp.sum(jnp.log(standardise.scale)), rtol=1e-5)
