"""Fits that cannot give a good posterior say so, once for each cause; good fits say nothing."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from flax import nnx

import sbi_flows as sf
from sbi_flows.estimators.fit_warnings import (
    Gain,
    _gain,
    ended_early,
    fall_of,
    few_rows,
    is_constant_output,
    nothing_learned,
    warn_after_fit,
)
from sbi_flows.training import History

PRIOR = sf.as_prior(dist.Normal(0.0, 1.0).expand([2]))
TINY = sf.MAF(transforms=1, hidden=(8,), context_width=0)
SHORT = sf.Training(max_epochs=8, ema_decay=0.9)


class Deaf(nnx.Module):
    """Embedding that ignores x."""

    def __init__(self, rngs):
        self.bias = nnx.Param(jax.random.normal(rngs.params(), (4,)))

    def __call__(self, x):
        return jnp.broadcast_to(self.bias.get_value(), (len(x), 4))


def npe(density=TINY, **settings):
    return sf.NPE(PRIOR, density, **{"training": SHORT, "members": 2, **settings})


def simulations(simulator, n=1000):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sf.simulate(jax.random.key(0), PRIOR, simulator, n, progress=False)


def informative(key, theta):
    return theta + 0.5 * jax.random.normal(key, (2,))


def unrelated(key, theta):
    return jax.random.normal(key, (2,)) + 0.0 * theta


def fit(estimator, sims):
    """Fit; return the messages of all warnings, the posterior and the history."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior, history = estimator.fit(jax.random.key(1), sims, progress=False)
    assert all(w.category is sf.SbiFlowsWarning for w in caught)
    assert all(w.filename == __file__ for w in caught)  # the user's line
    return [str(w.message) for w in caught], posterior, history


@pytest.fixture(scope="module")
def good():
    return simulations(informative)


@pytest.fixture(scope="module")
def fitted(good):
    return fit(npe(), good)


def stack(*estimators):
    return sf.Stack(estimators)


def test_good_fits_give_no_warning_at_all(good, fitted):
    assert fitted[0] == []
    assert (
        fit(stack(npe(), npe(sf.GaussianMixture(components=2, width=8, blocks=1))), good)[0] == []
    )


@pytest.mark.parametrize("count", [1, 2])
def test_a_fit_that_learned_nothing_says_so_once(count):
    sims = simulations(unrelated)
    estimator = npe() if count == 1 else stack(npe(), npe(linear_start=False))
    (message,) = fit(estimator, sims)[0]
    assert message.startswith("the fit learned nothing from x: the posterior is not better than")
    assert "nats on held-out rows). Check that x depends on theta" in message


def test_the_gain_is_that_of_the_exact_posterior(good, fitted):
    _, _, history = fitted
    gain = _gain(good, PRIOR, history)
    rows = np.unique(history.held_out)
    theta, x = (np.asarray(a, float)[rows] for a in (good.theta, good.x))
    variance = 0.25 / 1.25
    log_ratio = -0.5 * ((theta - 0.8 * x) ** 2 / variance + np.log(variance) - theta**2).sum(axis=1)
    assert gain.rows == len(rows) == 200
    assert gain.mean == pytest.approx(log_ratio.mean(), abs=0.1)
    assert gain.error == pytest.approx(log_ratio.std() / 200**0.5, rel=0.2)


def test_a_small_gain_is_none_and_needs_to_exceed_its_error_in_few_rows():
    assert nothing_learned(Gain(0.019, 0.001, 400))
    assert nothing_learned(Gain(-0.3, 0.1, 400))
    assert nothing_learned(Gain(0.021, 0.05, 400)) is None
    assert nothing_learned(Gain(0.021, 0.05, 40))
    assert nothing_learned(Gain(0.08, 0.05, 40)) is None
    assert nothing_learned(Gain(np.nan, np.nan, 0)) is None


@pytest.mark.parametrize("count", [1, 2])
def test_an_embedding_that_ignores_x_is_named_once(count, good):
    estimator = npe(embedding=Deaf)
    estimator = estimator if count == 1 else stack(estimator, npe(embedding=Deaf))
    (message,) = fit(estimator, good)[0]
    assert message.startswith("embedding: expected an output that depends on x, got the same for")
    assert "256 different observations from Deaf; check" in message


def test_outputs_of_embeddings_are_compared_relative_to_their_size():
    base = np.full((5, 3), 1e3)
    noise = np.random.default_rng(0).normal(size=(5, 3))
    assert is_constant_output(base) and is_constant_output(base + 1e-5 * noise)
    assert is_constant_output(np.zeros((5, 3)))
    assert not is_constant_output(base + noise)
    assert not is_constant_output(np.concatenate([base, noise], axis=1))
    assert not is_constant_output(base[:1])


@pytest.mark.parametrize("count", [1, 2])
def test_a_loss_that_still_falls_at_the_end_is_reported_once(count, good):
    short = npe(training=sf.Training(max_epochs=3), linear_start=False)
    (message,) = fit(short if count == 1 else stack(short, short), good)[0]
    assert message.startswith("the validation loss still fell when the fit ended after 3 epochs")
    assert message.endswith("train longer, for example with sf.Training(max_epochs=6)")


def history(validation, start, **settings):
    validation = np.array(validation, float)
    facts = {
        "train_loss": validation,
        "validation_loss": validation,
        "start_loss": np.array(start, float),
        "held_out": np.zeros((2, 1), int),
        "held_out_loss": np.zeros((2, 1)),
        "best_epoch": validation.argmin(axis=0) + 1,
        "epochs": len(validation),
        "seconds": 1.0,
        "stop_reason": "max_epochs",
    }
    return History(**{**facts, **settings})


def test_a_fall_is_that_of_the_best_loss_in_the_last_tenth():
    falling = history([[3.0, 3.0]] * 36 + [[2.9, 3.0], [2.8, 3.1], [2.7, 3.2], [2.6, 3.3]], [4, 4])
    assert fall_of(falling.start_loss, falling.validation_loss) == (pytest.approx(0.2), 4)
    assert "by 0.2 nats in the last 4" in ended_early(falling)
    assert ended_early(dataclasses.replace(falling, stop_reason="patience")) is None
    noisy = history([[3.0, 3.0]] * 38 + [[3.2, 3.0], [2.95, 3.0]], [4, 4])
    assert ended_early(noisy) is None
    assert ended_early(history([[1.0, 1.0]], [4, 4])) is None  # one epoch: no trend
    other = dataclasses.replace(falling, likelihood=False)
    assert "by 0.2 in the last 4" in ended_early(other)
    large = history(np.asarray(falling.validation_loss) + 97.0, [101, 101], likelihood=False)
    assert ended_early(large) is None


def test_an_interrupted_fit_says_nothing(good, fitted):
    _, posterior, found = fitted
    worse = dataclasses.replace(found, held_out_loss=found.held_out_loss + 9.0)
    with pytest.warns(sf.SbiFlowsWarning, match="learned nothing"):
        warn_after_fit(good, posterior, worse, varies=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interrupted = dataclasses.replace(worse, stop_reason="interrupted")
        warn_after_fit(good, posterior, interrupted, varies=True)
        warn_after_fit(good, posterior, worse, varies=False)


def test_few_valid_rows_are_counted_in_total_and_for_each_parameter(good):
    assert few_rows(100, 2) is None and few_rows(300, 30) is None
    assert (
        "at least 100 valid rows (the larger of 100 and 10 for each parameter), got 99"
        in few_rows(99, 2)
    )
    assert "at least 300 valid rows" in few_rows(299, 30)
    messages = fit(stack(npe(), npe()), good[:60])[0]
    assert len([m for m in messages if "at least 100 valid rows" in m]) == 1


@pytest.mark.parametrize("all_arrays", [True, False])
def test_constant_observations_are_named_once(all_arrays, good):
    fixed = np.full((1000, 3), 2.0, np.float32)
    sims = sf.Simulations(good.theta, {"seen": fixed if all_arrays else good.x, "fixed": fixed})
    for estimator in (npe(), stack(npe(), npe())):
        (message,) = fit(estimator, sims)[0]
        names = "fixed, seen" if all_arrays else "fixed"
        assert message.startswith(f"{names}: expected values that differ between simulations")


def test_failed_rows_are_reported_by_the_simulations_and_not_again_by_the_fit(good):
    x = np.array(good.x)
    x[:600] = np.nan
    with pytest.warns(sf.SbiFlowsWarning, match="600 of 1,000 rows contain NaN"):
        sims = sf.Simulations(good.theta, x)
    messages, posterior, _ = fit(npe(), sims)
    assert messages == []
    assert posterior.used_rows.count == 400


def test_a_fit_and_a_stack_know_their_rows(good, fitted):
    single = fitted[1]
    _, mixed, _ = fit(stack(npe(training=sf.Training(max_epochs=1)), npe()), good)
    for posterior in (single, mixed):
        assert posterior.used_rows.count == 1000
        with pytest.warns(sf.SbiFlowsWarning, match="1,000 of 1,000 rows were used to train"):
            sf.sbc(jax.random.key(2), posterior, good, draws=20)
