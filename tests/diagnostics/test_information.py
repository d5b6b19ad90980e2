"""Unused information is found, measured and named; an exact posterior passes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import special

from sbi_flows.diagnostics.independence import Rows, _sequential_scores, dependence
from sbi_flows.diagnostics.information import information_of, late_gain, start_gain
from sbi_flows.diagnostics.predictors import predict_all
from sbi_flows.diagnostics.ranks import draw_pass
from sbi_flows.diagnostics.summaries import summaries
from sbi_flows.diagnostics.uniformity import ks_p_value
from sbi_flows.prior.prior import as_prior
from sbi_flows.simulations.simulations import Simulations

N = 600


def rows_of(rng, scores, features):
    """Data sets whose posterior means and widths say nothing."""
    flat = np.zeros((len(features), 1))
    return Rows(features, scores, rng.normal(size=flat.shape), flat, flat + 1.0)


def test_independent_scores_pass():
    """The p-value is at most the level with at most that probability."""
    p_values = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        rows = rows_of(rng, rng.normal(size=(300, 4)), rng.normal(size=(300, 5)))
        p_values.append(dependence(rng, rows).p_value)
    assert np.mean(np.array(p_values) <= 0.05) <= 0.05


@pytest.mark.parametrize(
    ("kind", "nats"),
    [("linear", 0.35), ("periodic", 0.35), ("width", 0.12)],
)
def test_a_score_that_depends_on_the_data_is_found(kind, nats):
    rng = np.random.default_rng(1)
    x, noise = rng.normal(size=(N, 10)), rng.normal(size=N)
    score = {
        "linear": np.sqrt(0.5) * (noise + x[:, 3]),
        "periodic": np.sqrt(0.5) * noise + np.sin(2.0 * x[:, 3]),
        "width": noise * np.exp(0.7 * x[:, 3]),
    }[kind]
    scores = np.stack([rng.normal(size=N), score], axis=1)
    found = dependence(rng, rows_of(rng, scores, summaries(x)))
    assert found.p_value[1] < 1e-6 and found.p_value[0] > 0.01
    assert nats / 2 < found.nats[1] < 1.3 * nats
    assert abs(found.nats[0]) < 0.03


def test_an_error_that_is_the_same_everywhere_is_not_dependence():
    """A constant bias and width concern the calibration."""
    rng = np.random.default_rng(2)
    scores = 3.0 + 0.2 * rng.normal(size=(N, 1))
    found = dependence(rng, rows_of(rng, scores, rng.normal(size=(N, 4))))
    assert found.p_value[0] > 0.05 and abs(found.nats[0]) < 0.02


def test_sequential_scores_are_standard_normal_and_independent():
    rng = np.random.default_rng(3)
    scores = _sequential_scores(rng, rng.exponential(size=(4_000, 1)))[:, 0]
    assert ks_p_value(special.ndtr(scores)) > 0.01
    assert abs(np.corrcoef(scores[1:], scores[:-1])[0, 1]) < 0.05


def test_predictions_without_information_are_standard_normal():
    rng = np.random.default_rng(4)
    features, points = rng.normal(size=(N, 300)), rng.normal(size=(200, 300))
    new = rng.normal(size=(200, 2))
    for prediction in predict_all(rng, features, rng.normal(size=(N, 2)), points):
        assert prediction.mean.shape == prediction.sd.shape == (200, 2)
        assert np.mean(prediction.log_prob(new)) > -0.03


@pytest.mark.parametrize("features", [np.zeros((N, 0)), np.zeros((N, 1))])
def test_observations_that_do_not_vary(features):
    rng = np.random.default_rng(5)
    found = dependence(rng, rows_of(rng, rng.normal(size=(N, 1)), features))
    assert found.p_value[0] > 0.05


def test_the_summaries_of_an_image_give_the_place_of_a_blob():
    rng = np.random.default_rng(6)
    center = rng.uniform(8, 24, size=(N, 2))
    grid = np.arange(32.0)
    rows, columns = (np.exp(-((grid - c[:, None]) ** 2) / 18) for c in center.T)
    images = rows[:, :, None] * columns[:, None] + 0.5 * rng.normal(size=(N, 32, 32))
    features = summaries(images)
    for truth in center.T:
        correlation = np.abs(np.corrcoef(features.T, truth)[-1, :-1])
        assert correlation.max() > 0.98


def test_the_summaries_of_a_series_give_its_autocorrelation():
    rng = np.random.default_rng(7)
    phi = rng.uniform(-0.8, 0.8, size=N)
    series = np.zeros((N, 400))
    for t in range(1, 400):
        series[:, t] = phi * series[:, t - 1] + rng.normal(size=N)
    correlation = np.corrcoef(summaries(series).T, phi)[-1, :-1]
    assert correlation.max() > 0.98


def test_summaries_of_heavy_tails_and_of_several_arrays():
    rng = np.random.default_rng(8)
    x = {
        "a": rng.standard_cauchy(size=(50, 3)).astype(np.float32),
        "b": rng.integers(0, 2, size=(50,)),
        "image": rng.normal(size=(50, 16, 16, 3)),
        "constant": np.ones((50, 40)),
    }
    features = summaries(x)
    assert len(features) == 50 and np.all(np.isfinite(features))
    assert np.all(np.ptp(features, axis=0) > 0) and np.abs(features).max() <= 5.0


@pytest.mark.parametrize(
    ("change", "gain"),
    [
        ({}, 0.5),
        ({"likelihood": False}, None),
        ({"mean_held_out_loss": None}, None),
        ({"start_loss": ["a", {}]}, None),
    ],
)
def test_the_gain_over_the_linear_start_is_read_from_the_record(change, gain):
    history = {"likelihood": True, "start_loss": [1.0, 2.0], "mean_held_out_loss": 1.0, **change}
    record = {"history": history, "estimator": {"linear_start": True}}
    assert start_gain(record) == gain
    assert start_gain({**record, "estimator": {"linear_start": False}}) is None
    assert start_gain({}) is None


@pytest.mark.parametrize(
    ("change", "gain"),
    [
        ({}, 0.3),
        ({"stop_reason": "patience"}, None),
        ({"validation_loss": "none"}, None),
        ({"likelihood": False}, None),
    ],
)
def test_the_gain_of_the_last_epochs_is_read_from_the_record(change, gain):
    losses = [[2.0, 2.0], [1.0, 1.5], [0.9, 1.0]]
    history = {
        "likelihood": True,
        "stop_reason": "max_epochs",
        "start_loss": [1.2, 1.3],
        "validation_loss": losses,
        **change,
    }
    found = late_gain({"history": history})
    assert found == (None if gain is None else pytest.approx(gain))


def test_few_draws_of_an_exact_posterior_pass():
    """Errors of moments that the draws give are not information about the truth."""
    rng = np.random.default_rng(10)
    n, draws = 2_000, 20
    x = rng.normal(size=(n, 2)) * 1.12
    sample = 0.8 * x[:, None] + 0.45 * rng.normal(size=(n, draws + 1, 2))
    simulations = Simulations(sample[:, 0], x)
    ranks = draw_pass(
        jax.random.key(0), _Fixed(sample[:, 1:]), simulations, draws=draws, halves=True
    )
    found = information_of(jax.random.key(1), ranks, x, np.zeros(n), record={}, level=0.05)
    assert found.kind == "uses the data" and found.p_value.min() > 0.05
    # the network may still be no better than its start
    start = "training did not improve on the linear start"
    for gain, is_said in ((None, False), (0.3, False), (0.0, True)):
        assert (start in dataclasses.replace(found, start_gain=gain).verdict) == is_said


class _Fixed:
    """Posterior whose draws are given, for all data sets in their order."""

    def __init__(self, sample):
        self.prior, self.rows = as_prior(dist.Normal(0.0, 1.0).expand([2])), sample

    def sample(self, key, x, n):
        return jnp.asarray(self.rows)

    def log_prob(self, theta, x):
        return -jnp.sum(theta**2, axis=-1)


def test_the_test_repeats_with_the_same_random_numbers():
    x = np.random.default_rng(9).normal(size=(200, 3))
    first, second = (
        dependence(np.random.default_rng(0), rows_of(np.random.default_rng(1), x[:, :1], x))
        for _ in range(2)
    )
    np.testing.assert_array_equal(first.terms, second.terms)
    assert jax.tree.leaves(first)
