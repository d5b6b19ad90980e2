"""Joined simulations have the rows of all parts, with columns matched by name."""

import copy

import jax
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest

import sbi_flows as sf

RNG = np.random.default_rng(0)


def part(n, *, theta=None, x=None, **settings):
    theta = RNG.normal(size=(n, 2)) if theta is None else theta
    x = RNG.normal(size=(n, 3)) if x is None else x
    return sf.Simulations(theta, x, **settings)


@pytest.mark.filterwarnings("error")
def test_rows_marks_and_rounds_follow_each_other():
    x = RNG.normal(size=(40, 3))
    with pytest.warns(sf.SbiFlowsWarning, match="20 of 40 rows contain NaN"):
        failed = part(40, x=np.where(np.arange(40)[:, None] < 20, np.nan, x), round=np.full(40, 2))
    marked = part(5, valid=[1, 0, 1, 1, 0])
    joined = sf.concatenate([failed, marked, marked[:0:-1]])  # gives no second warning
    assert len(joined) == 49
    for name in ("theta", "x", "valid", "round"):
        parts = [np.asarray(getattr(each, name)) for each in (failed, marked, marked[:0:-1])]
        np.testing.assert_array_equal(getattr(joined, name), np.concatenate(parts))
        assert isinstance(getattr(joined, name), jax.Array)
        assert getattr(joined, name).dtype == getattr(failed, name).dtype
    assert joined.num_valid == 20 + 3 + 2 and set(np.asarray(joined.round).tolist()) == {0, 2}
    np.testing.assert_array_equal(sf.concatenate([marked]).x, marked.x)


def test_dicts_of_arrays_are_joined_by_key():
    first = {"image": RNG.normal(size=(4, 2, 2)), "count": np.arange(4)}
    second = {"count": np.arange(3), "image": RNG.normal(size=(3, 2, 2))}
    joined = sf.concatenate([part(4, x=first), part(3, x=second)])
    assert joined.x["count"].dtype == np.int32
    np.testing.assert_array_equal(joined.x["count"], [0, 1, 2, 3, 0, 1, 2])
    np.testing.assert_array_equal(joined.x["image"][4:], second["image"].astype(np.float32))


def test_columns_are_matched_by_name():
    a, b = RNG.normal(size=(2, 6)).astype(np.float32)
    first = part(6, theta={"a": a, "b": b}, x=pd.DataFrame({"u": a, "v": b}))
    second = part(6, theta={"b": b, "a": a}, x=pd.DataFrame({"v": b, "u": a}))
    joined = sf.concatenate([first, second])
    assert joined.names.theta == ("a", "b") and joined.names.x == ("u", "v")
    for columns in (joined.theta, joined.x):
        np.testing.assert_array_equal(columns, np.tile(np.c_[a, b], (2, 1)))


def test_columns_without_names_are_in_the_order_of_the_prior():
    prior = {"a": dist.Normal(0, 1), "b": dist.Normal(0, 1)}
    a, b = RNG.normal(size=(2, 6)).astype(np.float32)
    named, plain = part(6, theta={"b": b, "a": a}), part(6, theta=np.c_[a, b])
    for parts in ([named, plain], [plain, named]):
        with pytest.raises(ValueError, match=r"parts\[1\]: theta: .* in none, got .* prior=prior"):
            sf.concatenate(parts)
        joined = sf.concatenate(parts, prior=prior)
        assert joined.names.theta == ("a", "b")
        np.testing.assert_array_equal(joined.theta, np.tile(np.c_[a, b], (2, 1)))


def test_double_precision_is_kept():
    dates = 2459000.5 + np.arange(8.0)[:, None] / 1000
    small = part(4, x=np.zeros((4, 1)))
    precise = part(8, x=dates, theta=np.c_[dates, dates])
    joined = sf.concatenate([small, precise])
    assert joined.x.dtype == joined.theta.dtype == np.float64
    np.testing.assert_array_equal(joined.x[4:], dates)
    np.testing.assert_array_equal(joined.theta[:4], small.theta)
    # whole numbers and floats, as if they had been one array
    large = part(2, x=np.array([[2**24 + 1], [2**24 + 3]]))
    mixed = sf.concatenate([large, part(2, x=np.full((2, 1), 0.5))])
    np.testing.assert_array_equal(np.asarray(mixed.x, float)[:2], [[2**24 + 1], [2**24 + 3]])


def test_arrays_on_disk_stay_there(tmp_path):
    whole = RNG.normal(size=(20, 3)).astype(np.float32)
    np.save(tmp_path / "first.npy", whole[:12])
    mapped = part(12, x=np.load(tmp_path / "first.npy", mmap_mode="r"))
    store = sf.SimulationStore(tmp_path / "store", chunk=4)
    prior = dist.Normal(0, 1).expand([2])
    noisy = lambda key, theta: theta[0] + jax.random.normal(key, (3,))  # noqa: E731
    stored = store.simulate(jax.random.key(0), prior, noisy, 10, progress=False)
    joined = sf.concatenate([mapped, stored, part(8, x=whole[12:])])
    assert joined.on_disk and len(joined) == 30 and joined.x.dtype == np.float32
    expected = np.concatenate([whole[:12], stored.x[:], whole[12:]])
    np.testing.assert_array_equal(joined.x[:], expected)
    rows = np.array([29, 0, 13, 11, 12, 12])
    np.testing.assert_array_equal(joined.x[rows], expected[rows])
    np.testing.assert_array_equal(joined[5:25].x, expected[5:25])
    only_mapped = sf.concatenate([mapped, mapped[3:]])
    np.testing.assert_array_equal(only_mapped.x[12:], whole[3:12])
    # a copy contains the paths of the files, not their content
    copied = copy.deepcopy(only_mapped)
    (tmp_path / "first.npy").unlink()
    np.testing.assert_array_equal(copied.x[:], only_mapped.x[:])
    with pytest.raises(FileNotFoundError):
        copy.deepcopy(only_mapped)


def test_dates_on_disk_stay_in_double_precision(tmp_path):
    dates = 2459000.5 + np.arange(8.0)[:, None] / 1000
    np.save(tmp_path / "dates.npy", dates)
    mapped = part(8, x=np.load(tmp_path / "dates.npy", mmap_mode="r"))
    joined = sf.concatenate([part(2, x=np.zeros((2, 1))), mapped])
    assert joined.x.dtype == np.float64
    np.testing.assert_array_equal(joined.x[2:], dates)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"theta": np.zeros((4, 3))}, r"parts\[1\]: expected 2 columns of theta, got 3"),
        ({"x": np.zeros((4, 5))}, r"expected x=float32\[3\] as in the first .* x=float32\[5\]"),
        ({"x": {"y": np.zeros((4, 3))}}, r"expected x=float32\[3\] .* got x={y: float32\[3\]}"),
        (
            {"theta": {"a": np.zeros(4), "b": np.zeros(4)}},
            "got no names in the first part and a, b",
        ),
        (
            {"x": pd.DataFrame(np.zeros((4, 3)), columns=list("uvw"))},
            r"parts\[1\]: x: .* in none, got no names in the first part and u, v, w; .*to_numpy",
        ),
    ],
)
def test_parts_that_differ_are_refused(second, message):
    with pytest.raises(ValueError, match=message):
        sf.concatenate([part(4), part(4, **second)])


def test_other_names_and_other_types_are_refused():
    first, second = (part(4, theta={"a": np.zeros(4), name: np.zeros(4)}) for name in ("b", "c"))
    message = r"parts\[1\]: theta: expected the columns a, b, got a, c"
    with pytest.raises(ValueError, match=message):
        sf.concatenate([first, second])
    with pytest.raises(ValueError, match=r"parts\[0\]: expected Simulations, got ndarray"):
        sf.concatenate([np.zeros(3)])
    with pytest.raises(ValueError, match="at least one Simulations, got none"):
        sf.concatenate([])
