"""The classifier two-sample test against known accuracies."""

import numpy as np
import pytest
from scipy import stats

from sbi_flows.diagnostics import CompiledMLP, SklearnMLP, c2st


@pytest.fixture(scope="module")
def draws():
    return np.random.default_rng(0).normal(size=(2, 1500, 2))


def test_same_distribution_gives_one_half(draws):
    assert c2st(*draws, folds=2) == pytest.approx(0.5, abs=0.04)


def test_shifted_normals_give_the_accuracy_of_the_best_classifier(draws):
    shift = np.array([1.2, 1.6])  # distance 2: the best boundary lies at 1 sd on either side
    found = c2st(draws[0], draws[1] + shift, folds=3)
    assert found == pytest.approx(stats.norm.cdf(1.0), abs=0.02)


def test_units_do_not_matter(draws):
    reference, samples = draws[0, :200], draws[1, :200] + 3.0
    units, offset = np.array([1e-6, 1e3]), np.array([1.0, -1e6])
    moved = c2st(reference * units + offset, samples * units + offset, folds=2)
    assert moved == pytest.approx(c2st(reference, samples, folds=2), abs=0.01)


@pytest.mark.slow
def test_the_default_backend_takes_many_pairs_too(draws):
    sets = draws[:, :120].reshape(2, 2, 60, 2)
    expected = [c2st(a, b, folds=2) for a, b in zip(*sets, strict=True)]
    assert list(c2st(*sets, folds=2)) == expected
    assert list(c2st(*sets, folds=2, backend=SklearnMLP(jobs=2))) == expected


def test_jobs_belong_to_the_default_backend(draws):
    with pytest.raises(ValueError, match="jobs: expected None beside a backend"):
        c2st(*draws, jobs=2, backend=CompiledMLP())


def test_a_constant_column_says_nothing(draws):
    apart = draws[0, :100], draws[1, :100] + 10.0
    constant = [np.c_[d, np.full(100, 7.0)] for d in apart]
    assert c2st(*constant, folds=2) == c2st(*apart, folds=2) == 1.0


@pytest.mark.parametrize(
    ("reference", "samples", "message"),
    [
        (np.zeros(5), np.zeros((5, 1)), r"reference: expected numbers of shape \(N, D\), got .*5"),
        (np.zeros((9, 1)), np.full((9, 1), 1j), "samples: expected real numbers, got .*complex"),
        (np.zeros((9, 2)), np.zeros((9, 3)), "samples: expected 2 columns as in reference, got 3"),
        (np.zeros((9, 1)), np.full((9, 1), np.nan), "samples: expected finite values, got 9 rows"),
        (np.zeros((9, 1)), np.zeros((4, 1)), "folds: expected between 2 and .* got 5 for 9 .* 4"),
    ],
)
def test_bad_input_is_refused(reference, samples, message):
    with pytest.raises(ValueError, match=message):
        c2st(reference, samples)
