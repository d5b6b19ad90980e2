"""Random patterns of missing entries, shared standardisation, observations that lack entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sbi_flows as sf
from sbi_flows.observations.batches import Missing, as_batch
from sbi_flows.observations.standardise import fit_standardiser

KEY = jax.random.key(0)


def like(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_random_entries_hide_their_rate_and_leave_complete_and_empty_rows():
    keep = np.asarray(sf.RandomEntries(0.2).keep(KEY, like(30), 4000))
    hidden = 1.0 - keep.mean(axis=1)
    assert abs(hidden.mean() - (0.85 * 0.2 + 0.05)) < 0.01
    assert 0.05 < np.mean(hidden == 1.0) < 0.08
    assert np.mean(hidden == 0.0) > 0.1
    # within a row, entries are independent: no entry is special
    assert np.ptp(keep.mean(axis=0)) < 0.05


@pytest.mark.parametrize("order", ["random", "first"])
def test_random_subset_keeps_its_numbers_along_its_axis(order):
    pattern = sf.RandomSubset(3, 9, axis=1, order=order)
    keep = np.asarray(pattern.keep(KEY, like(2, 12), 3000)).reshape(-1, 2, 12)
    assert np.array_equal(keep[:, 0], keep[:, 1])
    counts = keep[:, 0].sum(axis=1)
    assert set(counts) == set(range(3, 10))
    # uniform on a logarithmic scale: half of the rows lie below the geometric mean
    assert abs(np.mean(counts <= 5) - np.log(6 / 3) / np.log(10 / 3)) < 0.03
    first = keep[:, 0, 0].mean()
    assert first == 1.0 if order == "first" else abs(first - counts.mean() / 12) < 0.03


def test_random_parts_hide_whole_arrays():
    x = {"image": jnp.ones((500, 2, 3)), "redshift": np.ones(500)}
    hidden = sf.RandomParts(0.3)(KEY, x)
    image = np.isnan(hidden["image"]).reshape(500, -1)
    assert np.all(image.all(axis=1) == image.any(axis=1))
    redshift = np.isnan(hidden["redshift"])
    assert abs(image.any(axis=1).mean() - 0.3) < 0.06 > abs(redshift.mean() - 0.3)
    assert np.mean(redshift == image.any(axis=1)) < 0.7
    assert isinstance(hidden["redshift"], np.ndarray)


def test_a_part_of_a_dict_is_chosen_by_name():
    x = {"spectrum": np.ones((50, 20)), "redshift": np.ones(50)}
    hidden = sf.RandomSubset(1, 10, part="spectrum")(KEY, x)
    assert np.isnan(hidden["spectrum"]).any() and not np.isnan(hidden["redshift"]).any()
    for part, message in ((None, "expected part="), ("flux", "one of .'redshift', 'spectrum'.")):
        with pytest.raises(ValueError, match=message):
            sf.RandomSubset(1, 10, part=part)(KEY, x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sf.RandomEntries(1.5), "rate"),
        (lambda: sf.RandomSubset(5, 3), "smallest: expected at most largest=3, got 5"),
        (lambda: sf.RandomSubset(1, 30)(KEY, np.ones((5, 20))), "at least 30 elements .* axis 0"),
        (lambda: sf.RandomSubset(1, 3, axis=2)(KEY, np.ones((5, 20))), "axis 2"),
        (lambda: sf.RandomParts(0.5)(KEY, np.ones((5, 20))), "several arrays, got 1"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_entries_along_a_shared_axis_are_scaled_alike():
    scale = np.array([1.0, 50.0])
    x = scale * np.asarray(jax.random.normal(KEY, (400, 6, 2))) + np.array([0.0, 7.0])
    shared = fit_standardiser(x, ((0,),))
    assert np.ptp(shared.scale.reshape(6, 2), axis=0).max() == 0.0
    np.testing.assert_allclose(shared.scale.reshape(6, 2)[0], scale, rtol=0.1)
    own = fit_standardiser(x)
    assert np.ptp(own.scale.reshape(6, 2), axis=0).min() > 0.0
    # permuted elements have permuted features
    features = np.asarray(shared(x)).reshape(400, 6, 2)
    np.testing.assert_array_equal(shared(x[:, ::-1]).reshape(400, 6, 2), features[:, ::-1])


@pytest.mark.parametrize("shared", [None, ((0,),)])
def test_missing_entries_are_zero_in_features_and_nan_after_the_inverse(shared):
    complete = np.exp(np.asarray(jax.random.normal(KEY, (300, 5))))
    x = np.where(np.random.default_rng(1).uniform(size=(300, 5)) < 0.3, np.nan, complete)
    standardiser = fit_standardiser(x, shared, has_missing=True)
    features = standardiser(x)
    missing = np.isnan(x)
    assert features.shape == (300, 10)
    np.testing.assert_array_equal(features[:, 5:], ~missing)
    assert np.all(np.asarray(features)[:, :5][missing] == 0.0)
    np.testing.assert_allclose(standardiser.inverse(features), x, rtol=1e-4)
    # statistics of the present entries alone
    np.testing.assert_allclose(
        standardiser.center[0],
        np.log(np.nanmedian(x[:, 0] if shared is None else x)),
        atol=0.02,
    )
    gradient = jax.grad(lambda row: jnp.sum(standardiser(row[None])))(jnp.asarray(x[0]))
    assert np.all(np.isfinite(gradient))


def test_entries_that_are_never_present_have_finite_features():
    x = np.where(np.arange(4) == 2, np.nan, np.random.default_rng(0).normal(size=(50, 4)))
    standardiser = fit_standardiser(x, has_missing=True)
    assert np.all(np.isfinite(standardiser(x)))
    assert standardiser.can_miss.tolist() == [0, 0, 2, 0]


def test_nan_is_refused_where_no_training_row_lacks_it():
    missing = Missing(np.array([True, False, True]))
    batch, single = as_batch(np.array([np.nan, 1.0, 2.0]), like(3), missing)
    assert single and np.isnan(batch[0, 0])
    with pytest.raises(ValueError, match=r"NaN in x\[1\], never missing there"):
        as_batch(np.array([1.0, np.nan, 2.0]), like(3), missing)
    with pytest.raises(ValueError, match="missing=True"):
        as_batch(np.array([1.0, np.nan, 2.0]), like(3))
    with pytest.raises(ValueError, match="finite"):
        as_batch(np.array([np.inf, 1.0, 2.0]), like(3), missing)


def test_shorter_sets_are_padded_and_other_shapes_are_refused():
    missing = Missing(np.ones(20, bool), ((0,),))
    for given, shape in (((4, 2), (1, 10, 2)), ((3, 4, 2), (3, 10, 2)), ((10, 2), (1, 10, 2))):
        batch, single = as_batch(np.ones(given), like(10, 2), missing)
        assert batch.shape == shape and single == (len(given) == 2)
        assert np.isnan(batch).sum() == np.prod(shape) - np.prod(given)
    for wrong in ((11, 2), (4, 3), (2,)):
        with pytest.raises(ValueError, match=r"expected shape \(10, 2\)"):
            as_batch(np.ones(wrong), like(10, 2), missing)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (sf.RandomEntries(0.01), [True] * 6),
        (sf.RandomSubset(2, 3), [True] * 6),
        (sf.RandomSubset(2, 3, order="first"), [False, False, False, False, True, True]),
        (sf.RandomSubset(3, 3), [False] * 6),
        (sf.RandomSubset(1, 2, axis=1, order="first"), [False, True] * 3),
    ],
)
def test_patterns_know_what_they_can_hide(pattern, expected):
    assert pattern.can_hide(like(3, 2)).tolist() == expected
    hidden = ~np.asarray(pattern.keep(KEY, like(3, 2), 2000))
    assert not np.any(hidden & ~np.array(expected))


def test_empty_sets_are_one_in_twenty():
    counts = np.asarray(sf.RandomSubset(0, 9).keep(KEY, like(10), 4000)).sum(axis=1)
    assert abs(np.mean(counts == 0) - 0.05) < 0.015 and counts.max() == 9


def test_a_column_that_is_never_present_does_not_stop_the_logarithm():
    x = np.exp(np.random.default_rng(0).normal(size=(300, 4)) * 2.0)
    x[:, 2] = np.nan
    floor = np.asarray(fit_standardiser(x, has_missing=True).floor)
    assert np.all((floor > 0) == [True, True, False, True])


def test_double_precision_keeps_the_symmetry_of_a_shared_axis():
    x = 2_460_000.0 + 1e-3 * np.random.default_rng(0).normal(size=(200, 5))
    standardiser = fit_standardiser(x, ((0,),))
    assert standardiser.origin is not None
    np.testing.assert_array_equal(standardiser(x[:, ::-1]), np.asarray(standardiser(x))[:, ::-1])
    np.testing.assert_allclose(np.asarray(standardiser(x)).std(), 1.0, rtol=0.1)


PARTS = {"spectrum": like(4), "redshift": like()}


@pytest.mark.parametrize(
    ("pattern", "shape", "x", "message"),
    [
        (sf.RandomSubset(3, 6), (8,), [1.0] * 2, "expected 3 to 6 elements along axis 0, got 2"),
        (sf.RandomSubset(3, 6), (8,), [1.0] * 7, "expected 3 to 6 elements along axis 0, got 7"),
        (sf.RandomSubset(3, 6), (8,), [], "expected 3 to 6 elements along axis 0, got 0"),
        (sf.RandomSubset(1, 8), (8, 2), [[1.0, np.nan], [1.0, 1.0]], "without missing entries"),
        (
            sf.RandomSubset(1, 8, order="first"),
            (8,),
            [1.0, np.nan, 1.0, 1.0],
            "without a gap before the last one",
        ),
    ],
)
def test_numbers_of_elements_that_the_fit_has_not_seen_are_refused(pattern, shape, x, message):
    missing = Missing(np.ones(np.prod(shape), bool), ((0,),), pattern)
    with pytest.raises(ValueError, match=f"x: .*{message}.* has not seen such"):
        as_batch(np.reshape(np.asarray(x), (-1, *shape[1:])), like(*shape), missing)
    complete = np.ones((pattern.largest, *shape[1:]))
    assert as_batch(complete, like(*shape), missing)[1]
    # the number that is wrong is found in a batch as well
    batch = np.full((2, *shape), np.nan)
    batch[0, : pattern.largest] = 1.0
    with pytest.raises(ValueError, match="got 0"):
        as_batch(batch, like(*shape), missing)


def test_arrays_that_are_present_in_part_are_refused():
    missing = Missing(np.ones(5, bool), (), sf.RandomParts(0.3))
    x = {"spectrum": np.full(4, np.nan), "redshift": np.float32(1.0)}
    assert as_batch(x, PARTS, missing)[1]
    short = as_batch({**x, "spectrum": np.nan}, PARTS, missing)
    assert short[1] and np.isnan(short[0]["spectrum"]).all()
    x["spectrum"][1] = 1.0
    with pytest.raises(ValueError, match="x: spectrum: expected all entries or none, got NaN"):
        as_batch(x, PARTS, missing)
    # a simulator that makes gaps itself has shown them to the fit
    assert as_batch(x, PARTS, missing._replace(simulates_gaps=True))[1]


@pytest.mark.parametrize("pattern", [sf.RandomEntries(0.2), sf.RandomSubset(0, 8), None])
def test_an_empty_observation_is_accepted_where_the_fit_has_seen_some(pattern):
    missing = Missing(np.ones(8, bool), ((0,),), pattern, simulates_gaps=pattern is None)
    nothing = np.full((2, 8), np.nan)
    if pattern is None:  # a simulation without any entry is a failed one
        with pytest.raises(ValueError, match="at least one entry that is not missing"):
            as_batch(nothing, like(8), missing)
    else:
        assert as_batch(nothing, like(8), missing)[0].shape == (2, 8)


def test_a_column_is_neither_one_observation_nor_a_batch():
    missing = Missing(np.ones(8, bool), ((0,),), sf.RandomSubset(1, 8))
    with pytest.raises(ValueError, match=r"a column \(5, 1\); for one observation .* x\[:, 0\]"):
        as_batch(np.ones((5, 1)), like(8), missing)
    assert as_batch(np.ones((1, 1)), like(8), missing) is not None
    assert as_batch(np.ones((5, 2)), like(8), missing)[0].shape == (5, 8)


def test_shapes_of_several_arrays_are_named():
    x = {"spectrum": np.ones((4, 1)), "redshift": np.float32(1.0)}
    with pytest.raises(ValueError, match=r"redshift \(\), spectrum \(4,\), or a batch of it, got"):
        as_batch(x, PARTS)
