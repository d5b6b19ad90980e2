"""Tables, lists, dicts and masked arrays are taken by one set of rules."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.core.checks import as_real_array, as_tree
from sbi_flows.core.frames import reorder_columns

pandas = pytest.importorskip("pandas")
RNG = np.random.default_rng(0)


def tree(value, like=None):
    return as_tree("x", value, as_real_array, like)


def test_a_list_holds_rows():
    rows = [RNG.normal(size=20) for _ in range(50)]
    np.testing.assert_array_equal(tree(rows), np.stack(rows).astype(np.float32))
    square = [RNG.normal(size=50) for _ in range(50)]
    sims = sf.Simulations(np.zeros((50, 1)), square)
    np.testing.assert_allclose(sims.x, np.stack(square), rtol=1e-6)
    np.testing.assert_array_equal(tree([jnp.ones(3), jnp.zeros(3)]), [[1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(tree([[1, 2], [3, 4]]), [[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"rows of one shape in a list, got shapes \(2,\), \(3,\)"):
        tree([np.zeros(2), np.zeros(3)])


def test_a_list_of_dicts_holds_rows():
    rows = [{"a": float(i), "b": np.full(2, i)} for i in range(4)]
    found = tree(rows)
    np.testing.assert_array_equal(found["a"], np.arange(4.0))
    assert found["b"].shape == (4, 2)
    with pytest.raises(
        ValueError, match="rows with the same names, got a in the first row and b in"
    ):
        tree([{"a": 1.0}, {"b": 1.0}])


def test_tuples_and_lists_of_the_simulator_are_containers():
    parts = (np.zeros((4, 2)), np.ones((4, 3)))
    assert [a.shape for a in tree(parts)] == [(4, 2), (4, 3)]
    assert tree((1.0, 2.0)).shape == (2,)
    like = [jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.float32)]
    assert [a.shape for a in tree([np.zeros(2), np.ones(3)], like)] == [(2,), (3,)]


FRAME = pandas.DataFrame({"a": RNG.normal(size=30), "b": RNG.normal(size=30)})


def test_columns_of_theta_are_matched_by_name():
    prior = sf.as_prior({"b": dist.Normal(0, 1), "a": dist.Normal(0, 1)})
    for theta in (FRAME, {"a": FRAME.a, "b": FRAME.b}):
        sims = sf.Simulations(theta, np.zeros((30, 1)))
        assert sims.names.theta == ("a", "b")
        assert sims[:10].names.theta == ("a", "b")
        aligned = sims.aligned(prior)
        np.testing.assert_allclose(aligned.theta, FRAME[["b", "a"]], rtol=1e-6)
    other = sf.as_prior({"c": dist.Normal(0, 1), "a": dist.Normal(0, 1)})
    with pytest.raises(ValueError, match="like the prior's parameters, c, a, got a, b"):
        sims.aligned(other)
    with pytest.raises(ValueError, match="like the prior's parameters, c, a, got a, b"):
        sf.NPE(other).fit(jax.random.key(0), sims)
    assert sims.aligned(sf.as_prior(dist.Normal(0, 1).expand([2]))) is sims


def test_parameters_of_a_density_are_matched_by_name():
    prior = sf.as_prior({"b": dist.Normal(3.0, 1.0), "a": dist.Normal(0, 1).expand([2])})
    values = {"a": np.array([[0.1, 0.2]]), "b": np.array([3.5])}
    expected = prior.log_prob(np.array([[3.5, 0.1, 0.2]]))
    table = pandas.DataFrame({"a[1]": [0.2], "b": [3.5], "a[0]": [0.1]})
    for theta in (values, table):
        np.testing.assert_array_equal(prior.log_prob(theta), expected)
        np.testing.assert_allclose(prior.from_standard(prior.to_standard(theta)), [[3.5, 0.1, 0.2]])

    def simulator(key, theta):
        return theta["b"] + 0.0 * theta["a"][0] + jax.random.normal(key)

    sims = sf.simulate_at(jax.random.key(0), prior, simulator, table, progress=False)
    np.testing.assert_allclose(sims.theta, [[3.5, 0.1, 0.2]], rtol=1e-6)
    with pytest.raises(ValueError, match="expected the columns b, a"):
        prior.log_prob(table.rename(columns={"b": "c"}))


def test_arrays_in_a_dict_of_theta_have_labels():
    sims = sf.Simulations({"s": np.zeros(5), "v": np.ones((5, 2))}, np.zeros((5, 1)))
    assert sims.names.theta == ("s", "v[0]", "v[1]")
    with pytest.raises(ValueError, match="arrays with the same number of rows"):
        sf.Simulations({"s": np.zeros(5), "v": np.ones((4, 2))}, np.zeros((5, 1)))


@pytest.mark.promotes
def test_columns_of_x_are_matched_by_name(tmp_path):
    theta = RNG.normal(size=(500, 2))
    frame = pandas.DataFrame({"u": theta[:, 0], "v": 10 + theta[:, 1]})
    npe = sf.NPE(
        dist.Normal(0, 1).expand([2]),
        sf.MAF(transforms=1),
        members=1,
        training=sf.Training(max_epochs=1),
    )
    posterior, _ = npe.fit(jax.random.key(0), sf.Simulations(theta, frame), progress=False)
    posterior.save(tmp_path / "p.sbif")
    loaded = sf.load(tmp_path / "p.sbif")
    point, x = jnp.zeros(2), np.array([0.5, 10.5])
    expected = posterior.log_prob(point, x)
    row = pandas.DataFrame({"v": [10.5], "u": [0.5]})
    for p in (posterior, loaded):
        assert p.log_prob(point, row.iloc[0]) == expected
        assert p.log_prob(point, {"v": 10.5, "u": 0.5}) == expected
        assert p.log_prob(point[None], row).shape == (1,)
        with pytest.raises(ValueError, match="the columns u, v, got u, w"):
            p.log_prob(point, row.rename(columns={"v": "w"})[["u", "w"]].iloc[0])


def test_columns_of_any_kind():
    frame = pandas.DataFrame(
        {
            "flag": [True, False, True],
            "count": pandas.array([1, None, 3], dtype="Int64"),
            "maybe": pandas.array([True, None, False], dtype="boolean"),
            "size": [1.5, 2.5, 3.5],
        }
    )
    found = as_real_array("x", frame)
    np.testing.assert_array_equal(found, [[1, 1, 1, 1.5], [0, np.nan, np.nan, 2.5], [1, 3, 0, 3.5]])
    with pytest.raises(ValueError, match="column 'name': expected real numbers, got str"):
        as_real_array("x", frame.assign(name=["a", "b", "c"]))


def test_order_is_kept_where_names_are_not_known():
    assert reorder_columns("x", FRAME, None) is FRAME
    assert reorder_columns("x", np.zeros(2), ("a", "b")).shape == (2,)


def test_many_invalid_rows_are_counted_once():
    x = RNG.normal(size=(100, 2))
    x[:90, 1] = np.nan
    with pytest.warns(sf.SbiFlowsWarning, match="90 of 100 rows contain NaN or infinity"):
        sims = sf.Simulations(np.zeros((100, 1)), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sims[:95].num_valid == 5
        x[:90] = 0.0
        x[:5] = np.nan
        assert sf.Simulations(np.zeros((100, 1)), x).num_valid == 95


def test_masked_entries_of_an_external_simulator_fail_the_row():
    from simulators import external_simulator

    @external_simulator(shape=(2,), dtype=float)
    def masked(seed, theta):
        return np.ma.masked_array([1.0, -9999.0], [False, float(theta[0]) > 0])

    prior = sf.as_prior(dist.Normal(0, 1).expand([1]))
    with pytest.warns(sf.SbiFlowsWarning, match="1 masked entries"):
        sims = sf.simulate_at(jax.random.key(0), prior, masked, [[1.0], [-1.0]], progress=False)
    np.testing.assert_array_equal(sims.valid, [False, True])


@pytest.mark.promotes
def test_columns_of_a_prior_without_names_are_matched_by_their_labels():
    prior = sf.as_prior(dist.Normal(jnp.array([0.0, 100.0]), 1.0))
    swapped = pandas.DataFrame({"theta[1]": [100.5], "theta[0]": [0.5]})
    assert prior.log_prob(swapped) == prior.log_prob(np.array([[0.5, 100.5]]))
    sims = sf.Simulations(swapped, np.zeros((1, 1))).aligned(prior)
    np.testing.assert_array_equal(sims.theta, [[0.5, 100.5]])
    other = pandas.DataFrame({"a": [0.5], "b": [100.5]})
    assert prior.log_prob(other) == prior.log_prob(swapped)


def test_a_series_of_rows_with_labels_has_no_columns():
    sims = sf.Simulations(np.zeros((3, 1)), pandas.Series([1.0, 2.0, 3.0], index=["r", "s", "t"]))
    assert sims.names.x is None


def test_tables_in_a_tuple_are_arrays_of_their_own():
    first, second = tree((FRAME, FRAME[["a"]]))
    assert first.shape == (30, 2) and second.shape == (30, 1)


def test_a_dict_of_columns_can_be_traced():
    stacked = jax.jit(lambda a: reorder_columns("x", {"v": a, "u": 2 * a}, ("u", "v")))(1.0)
    np.testing.assert_array_equal(stacked, [2.0, 1.0])
