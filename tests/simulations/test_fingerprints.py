"""Fingerprints recognise rows of simulations that were used before, in every form they come in."""

import jax
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.simulations import fingerprints as module
from sbi_flows.simulations.fingerprints import MAX_HASHED_ENTRIES, UsedRows, fingerprints

PRIOR = sf.as_prior({"a": dist.Normal(0.0, 1.0), "b": dist.Normal(0.0, 2.0)})


def rows(seed, n=1000, entries=3):
    rng = np.random.default_rng(seed)
    theta, x = rng.normal(size=(n, 2)), rng.normal(size=(n, entries))
    return theta.astype(np.float32), x.astype(np.float32)


THETA, X = rows(0)
SIMS = sf.Simulations(THETA, X)
USED = UsedRows.of(SIMS, PRIOR)


def test_all_a_part_and_a_single_row_are_counted():
    fresh = sf.Simulations(*rows(1))
    assert USED.overlap(SIMS, PRIOR) == USED.count == 1000
    assert USED.overlap(fresh, PRIOR) == 0
    for part in (50, 1):
        mixed = sf.Simulations(
            *(
                np.concatenate([a[:part], b[part:]])
                for a, b in zip((THETA, X), rows(1), strict=True)
            )
        )
        assert USED.overlap(mixed, PRIOR) == part
        np.testing.assert_array_equal(USED.among(mixed, PRIOR), np.arange(1000) < part)


def test_each_number_of_theta_and_x_counts_and_its_place():
    for spoilt in (THETA, X):
        for column in range(spoilt.shape[1]):
            other = spoilt.copy()
            other[:, column] = np.nextafter(other[:, column], np.float32(9.0))
            pair = (other, X) if spoilt is THETA else (THETA, other)
            assert USED.overlap(sf.Simulations(*pair), PRIOR) == 0
    assert USED.overlap(sf.Simulations(THETA, X[:, ::-1]), PRIOR) == 0
    assert USED.overlap(sf.Simulations(THETA[:, ::-1], X), PRIOR) == 0


def test_a_repeated_theta_with_new_noise_is_a_new_row():
    assert USED.overlap(sf.Simulations(THETA, rows(1)[1]), PRIOR) == 0


def test_other_dtypes_signs_of_zero_and_files_of_the_same_values_agree(tmp_path):
    whole = np.round(X)  # has zeros of both signs
    used = fingerprints(sf.Simulations(THETA, whole))
    assert np.any(np.signbit(whole) & (whole == 0.0))
    np.savez(tmp_path / "a.npz", theta=THETA, x=whole)
    file = np.load(tmp_path / "a.npz")
    np.save(tmp_path / "x.npy", whole)
    for theta, x in (
        (THETA.astype(float), whole.astype(float)),
        (THETA, whole.astype(np.int8)),
        (file["theta"], file["x"]),
        (THETA, np.load(tmp_path / "x.npy", mmap_mode="r")),
    ):
        np.testing.assert_array_equal(fingerprints(sf.Simulations(theta, x)), used)


def test_numbers_beyond_single_precision_are_compared_exactly():
    days = 2_459_000.5 + np.arange(100.0)[:, None] * 1e-3
    first = UsedRows.of(sf.Simulations(THETA[:100], days), PRIOR)
    assert first.overlap(sf.Simulations(THETA[:100], days + 1e-4), PRIOR) == 0
    assert first.overlap(sf.Simulations(THETA[:100], days), PRIOR) == 100


def test_named_columns_are_matched_by_name_and_selected_rows_by_content():
    a, b = THETA.T
    named = sf.Simulations({"b": b, "a": a}, X)
    assert USED.overlap(named, PRIOR) == 1000
    assert USED.overlap(named[::-1][:70], PRIOR) == 70


def test_dicts_of_arrays_and_long_arrays_are_told_apart():
    theta, x = rows(2, n=300, entries=500)
    used = UsedRows.of(sf.Simulations(theta, {"u": x, "v": X[:300]}), PRIOR)
    assert used.overlap(sf.Simulations(theta, {"u": x, "v": X[:300]}), PRIOR) == 300
    assert used.overlap(sf.Simulations(theta, {"u": x, "v": X[300:600]}), PRIOR) == 0
    hashed = np.linspace(0, 499, MAX_HASHED_ENTRIES).astype(int)
    other = x.copy()
    other[:, hashed[7]] += 1.0
    assert used.overlap(sf.Simulations(theta, {"u": other, "v": X[:300]}), PRIOR) == 0
    twins = [sf.Simulations(theta, {"u": p, "v": q}) for p, q in ((X[:300], X[300:600]),) * 2]
    swapped = sf.Simulations(theta, {"u": X[300:600], "v": X[:300]})
    assert UsedRows.of(twins[0], PRIOR).overlap(twins[1], PRIOR) == 300
    assert UsedRows.of(twins[0], PRIOR).overlap(swapped, PRIOR) == 0


def test_failed_rows_do_not_count():
    x = X.copy()
    x[:5] = np.nan
    used = UsedRows.of(sf.Simulations(THETA, x), PRIOR)
    assert used.count == 995
    assert used.overlap(sf.Simulations(THETA, x), PRIOR) == 995


def test_hashes_are_uniform_and_do_not_collide():
    theta = np.arange(200_000.0)[:, None] % 500  # few different values, of few bits
    x = np.arange(200_000.0)[:, None] // 500
    hashes = fingerprints(sf.Simulations(theta, x))
    assert len(np.unique(hashes)) == 200_000
    bits = (hashes[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / 200_000**0.5


def test_of_many_rows_a_sample_is_kept_and_counts_are_estimated(monkeypatch):
    monkeypatch.setattr(module, "MAX_HASHES", 2_000)
    first, second = sf.Simulations(*rows(3, n=20_000)), sf.Simulations(*rows(4, n=5_000))
    used = UsedRows.of(first, PRIOR)
    assert len(used.hashes) == 2_000
    assert used.fraction == pytest.approx(0.1, rel=0.1)
    assert used.count == pytest.approx(20_000, rel=0.1)
    assert used.overlap(first[:10_000], PRIOR) == pytest.approx(10_000, rel=0.15)
    assert used.overlap(second, PRIOR) == 0
    both = used.union(UsedRows.of(second[:1_000], PRIOR))
    assert len(both.hashes) == 2_000
    assert both.count == pytest.approx(21_000, rel=0.1)
    assert both.overlap(second[:1_000], PRIOR) == pytest.approx(1_000, abs=400)
    assert both.overlap(second[1_000:], PRIOR) == 0


def test_a_union_knows_the_rows_of_both():
    other = sf.Simulations(*rows(5))
    both = USED.union(UsedRows.of(other[:200], PRIOR))
    assert (both.count, both.union(None)) == (1_200, both)
    assert (both.overlap(SIMS, PRIOR), both.overlap(other, PRIOR)) == (1_000, 200)
    assert np.all(both.hashes[1:] > both.hashes[:-1])


def test_a_prior_with_an_offset_leaves_the_fingerprints_in_the_users_units():
    prior = sf.as_prior(dist.Uniform(2_459_000.0, 2_459_001.0).expand([1]))
    theta = np.asarray(prior.sample(jax.random.key(0), 200))
    assert theta.dtype == np.float64  # single precision would round to a quarter of a day
    used = UsedRows.of(sf.Simulations(theta, X[:200]), prior)
    assert used.overlap(sf.Simulations(theta.copy(), X[:200]), prior) == 200
    assert used.overlap(sf.Simulations(theta + 1e-3, X[:200]), prior) == 0
