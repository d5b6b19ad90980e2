"""The compiled backend of `c2st` reproduces scikit-learn's accuracies."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neural_network import MLPClassifier

from sbi_flows.diagnostics import CompiledMLP, c2st, c2st_compiled, c2st_jax


def pairs(count, rows, dim, seed=0):
    """Return pairs of sets whose widths differ by a growing factor."""
    draws = np.random.default_rng(seed).normal(size=(2, count, rows, dim))
    return draws[0], draws[1] * np.linspace(1.0, 1.6, count)[:, None, None]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_first_epochs_are_those_of_scikit_learn():
    """Weights agree to rounding; 481 rows make two full batches and a short one."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(481, 3)).astype(np.float32), np.arange(481) % 2
    expected = MLPClassifier((30, 30), random_state=1, max_iter=4).fit(x, y)
    run = c2st_compiled._Run(481, 3, 30, 1)
    state, losses = run.state, []
    for _ in range(4):
        state, loss = c2st_compiled._epoch(
            state, jnp.asarray(x), jnp.asarray(y, jnp.float32), *run.next_batches()
        )
        losses.append(float(loss))
    np.testing.assert_allclose(losses, expected.loss_curve_, rtol=1e-5)
    for (kernel, bias), a, b in zip(
        state.weights, expected.coefs_, expected.intercepts_, strict=True
    ):
        np.testing.assert_allclose(kernel, a, atol=1e-4)
        np.testing.assert_allclose(bias, b, atol=1e-4)


@pytest.mark.slow
def test_accuracies_are_those_of_scikit_learn():
    """Rounding errors grow over hundreds of training steps, hence the tolerance."""
    reference, samples = pairs(3, 1501, 1)
    expected = [c2st(a, b) for a, b in zip(reference, samples, strict=True)]
    np.testing.assert_allclose(c2st_jax(reference, samples), expected, atol=0.01)
    assert c2st_jax(reference[1], samples[1]) == pytest.approx(expected[1], abs=0.01)


def test_folds_side_by_side_give_the_same(monkeypatch):
    reference, samples = pairs(2, 501, 1)
    on_threads = c2st_jax(reference, samples)
    monkeypatch.setattr(c2st_compiled, "_on_cpu", lambda: False)
    np.testing.assert_allclose(c2st_jax(reference, samples), on_threads, atol=0.012)


def test_c2st_jax_is_c2st_with_the_compiled_backend():
    reference, samples = pairs(2, 60, 1)
    expected = c2st(reference, samples, folds=3, seed=2, backend=CompiledMLP())
    np.testing.assert_array_equal(c2st_jax(reference, samples, folds=3, seed=2), expected)
    assert c2st(reference[0], samples[0], folds=3, seed=2, backend=CompiledMLP()) == expected[0]


def test_a_second_call_of_the_same_shapes_compiles_nothing():
    reference, samples = pairs(1, 60, 1)
    c2st_jax(reference, samples)
    programs = c2st_compiled._epoch._cache_size()
    c2st_jax(samples, reference)
    assert c2st_compiled._epoch._cache_size() == programs


@pytest.mark.release
def test_twenty_pairs_agree():
    for dim in (1, 2):
        reference, samples = pairs(10, 4000, dim)
        expected = [c2st(a, b, jobs=-1) for a, b in zip(reference, samples, strict=True)]
        np.testing.assert_allclose(c2st_jax(reference, samples), expected, atol=0.005)


@pytest.mark.parametrize(
    ("reference", "samples", "message"),
    [
        (np.zeros((9, 2)), np.zeros((9, 3)), "samples: expected 2 columns as in reference, got 3"),
        (np.zeros((9, 1)), np.full((9, 1), np.nan), "samples: expected finite values, got 9 rows"),
        (np.zeros((3, 9, 1)), np.zeros((2, 9, 1)), r"or \(B, N, D\) and \(B, M, D\), got"),
        (np.zeros((3, 9, 1)), np.zeros((9, 1)), r"or \(B, N, D\) and \(B, M, D\), got"),
        (np.zeros((0, 9, 1)), np.zeros((0, 9, 1)), r"or \(B, N, D\) and \(B, M, D\), got"),
        (np.zeros((2, 9, 1)), np.zeros((2, 4, 1)), "folds: expected between 2 and .* got 5 for 9"),
    ],
)
def test_bad_input_is_refused(reference, samples, message):
    with pytest.raises(ValueError, match=message):
        c2st_jax(reference, samples)
