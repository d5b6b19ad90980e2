"""Pickling and copying of priors, simulations, estimators, posteriors, histories and reports."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import pytest
from flax import nnx

import sbi_flows as sf
from sbi_flows.posteriors.adapter import as_posterior
from sbi_flows.prior.box import BoxPrior
from tests.artefacts import bits, ensemble
from tests.artefacts import posterior as mixture_of
from tests.cases import PRIORS, hierarchy
from tests.gaussian import make_gaussian
from tests.posteriors.test_inside_jax import CASES, QUICK

pytestmark = pytest.mark.promotes

ROOT = Path(__file__).parents[2]
KEY = jax.random.key(7)
X = jnp.array([0.31, 1.2, -0.7])
COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "cloudpickle": lambda value: cloudpickle.loads(cloudpickle.dumps(value)),
    "deepcopy": copy.deepcopy,
}


def require_equal_copies(value: Any, result: Callable[[Any], Any]) -> None:
    """Compare the result for a value, bit for bit, with the result for each of its copies."""
    expected = bits(result(value))
    for name, copied in COPIES.items():
        again = copied(value)
        assert type(again) is type(value)
        assert bits(result(again)) == expected, name


def of_prior(prior: sf.Prior) -> Any:
    draws = prior.sample(KEY, 5)
    return draws, prior.log_prob(draws), prior.to_standard(draws)


def observation(name: str) -> jax.Array:
    return jnp.stack([X, X + 0.2]) if name == "composed" else X


def small(prior: Any, **settings: Any) -> sf.NPE:
    training = sf.Training(max_epochs=1, batch_size=50)
    density = settings.pop("density", sf.MAF(transforms=1, hidden=(8,), context_width=0))
    return sf.NPE(prior, density, training=training, members=1, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_copies_of_a_prior_give_the_same_draws_and_densities(name):
    prior = sf.as_prior(PRIORS[name]())
    require_equal_copies(prior, of_prior)
    assert all(copied(prior).matches(prior) for copied in COPIES.values())


@pytest.mark.slow
def test_copies_of_a_prior_cut_to_a_box_are_the_same():
    prior = sf.as_prior({"a": dist.HalfNormal(2.0), "b": dist.TruncatedNormal(0.1, 1.0, low=0.0)})
    require_equal_copies(BoxPrior(prior, [-1.0, 0.0], [0.5, 2.0]), of_prior)


def test_an_integer_parameter_and_one_from_a_jitted_function_are_kept():
    prior = jax.jit(lambda prior: prior)(sf.as_prior(dist.Normal(0, 3)))
    require_equal_copies(prior, of_prior)
    assert COPIES["pickle"](prior).distributions["theta"].scale == 3.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_copies_of_a_posterior_give_the_same_draws_and_densities(name):
    made, x = CASES[name](), observation(name)
    require_equal_copies(made, lambda p: p.sample_and_log_prob(KEY, x, 5))
    require_equal_copies(made.at(x), lambda at: at.sample_and_log_prob(KEY, 5))
    assert repr(COPIES["pickle"](made)) == repr(made)


def test_copies_of_a_posterior_of_another_library_are_the_same():
    adapted = as_posterior(make_gaussian(2), X[:2])
    require_equal_copies(adapted, lambda p: p.sample_and_log_prob(KEY, X[:2], 5))


def noisy(key: jax.Array, theta: dict[str, jax.Array]) -> jax.Array:
    return theta["a"] + theta["b"] + 0.3 * jax.random.normal(key, (3,))


@pytest.fixture(scope="module")
def fitted() -> tuple[sf.NPE, sf.Simulations, sf.Posterior, sf.History]:
    """An estimator, simulations, and the results of the fit."""
    prior = {"a": dist.HalfNormal(2.0), "b": dist.Uniform(0.0, 3.0)}
    simulations = sf.simulate(KEY, prior, noisy, 300, progress=False)
    estimator = small(prior)
    return estimator, simulations, *estimator.fit(KEY, simulations, progress=False)


@pytest.mark.slow
def test_copies_of_a_fit_and_of_all_that_it_needs_are_the_same(fitted):
    estimator, simulations, posterior, history = fitted
    require_equal_copies(simulations, lambda s: (s.theta, s.x, s.valid, s.round))
    require_equal_copies(history, lambda h: (h.train_loss, h.held_out, h.best_epoch))
    require_equal_copies(posterior, lambda p: p.sample_and_log_prob(KEY, X, 5))
    require_equal_copies(posterior, lambda p: p.misspecification(X).p_value)
    assert posterior.used_rows.count == 300
    require_equal_copies(posterior, lambda p: p.used_rows.hashes)
    again = COPIES["pickle"](estimator)
    assert again.density == estimator.density
    refitted, _ = again.fit(KEY, simulations, progress=False)
    assert bits(refitted.weights) == bits(posterior.weights)


def test_the_record_of_a_copy_is_equal_and_read_only(fitted):
    posterior = fitted[2]
    for copied in COPIES.values():
        record = copied(posterior).record
        assert dict(record) == dict(posterior.record)
        assert record == posterior.record
        with pytest.raises(TypeError, match="item assignment"):
            record["rows"] = 1


def test_a_file_of_a_copy_is_the_same(fitted, tmp_path):
    for name, made in (("a", fitted[2]), ("b", COPIES["pickle"](fitted[2]))):
        made.save(tmp_path / f"{name}.sbif")
    assert (tmp_path / "a.sbif").read_bytes() == (tmp_path / "b.sbif").read_bytes()


def test_copies_of_a_stack_are_equal(fitted):
    estimator = fitted[0]
    stack = sf.Stack([estimator, small(estimator.prior, density=sf.GaussianMixture(components=2))])
    for copied in COPIES.values():
        assert repr(copied(stack).estimators) == repr(stack.estimators)


def test_copies_of_a_check_are_the_same():
    report = sf.check(
        KEY, make_gaussian(1), lambda key, t: t + jax.random.normal(key, t.shape) / 2,
        datasets=50, draws=50, progress=False,
    )  # fmt: skip
    for copied in COPIES.values():
        again = copied(report)
        assert again.summary() == report.summary()
        assert bits(again.sbc.uniform) == bits(report.sbc.uniform)


def test_the_error_for_an_embedding_that_pickle_cannot_import_is_that_of_pickle():
    class Local(nnx.Module):
        def __init__(self) -> None:
            self.layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.layer(x)

    prior = sf.as_prior(dist.Normal(0.0, 1.0))
    made = mixture_of(prior, ensemble(sf.MAF(), prior.bounded, embedding=Local()))
    with pytest.raises((AttributeError, pickle.PicklingError), match="Local"):
        pickle.dumps(made)


IN_ANOTHER_PROCESS = """
import tests.conftest, pickle, sys, jax
jax.config.update("jax_numpy_rank_promotion", "allow")
with open(sys.argv[1], "rb") as file:
    priors, bound, key = pickle.load(file)
results = []
for prior in priors:
    draws = prior.sample(key, 5)
    results.append((draws, prior.log_prob(draws)))
results.append(bound.sample_and_log_prob(key, 5))
with open(sys.argv[2], "wb") as file:
    pickle.dump(jax.device_get(results), file)
"""


@pytest.mark.release
def test_another_process_gives_the_same_draws(tmp_path):
    """Numpyro orders the parameters of a distribution by hashes, which differ there."""
    priors = [
        sf.as_prior({"a": dist.Uniform(1.0, 3.0), "b": dist.Normal(5.0, 0.1)}),
        sf.as_prior(dist.TruncatedNormal(1.0, 2.0, low=0.5)),
        sf.as_prior(dist.StudentT(3.0, 1.0, 2.0)),
        sf.as_prior(hierarchy),
    ]
    bound = CASES["recalibrated"]().at(X)
    expected: list[Any] = []
    for prior in priors:
        draws = prior.sample(KEY, 5)
        expected.append((draws, prior.log_prob(draws)))
    expected.append(bound.sample_and_log_prob(KEY, 5))
    source, result = tmp_path / "source", tmp_path / "result"
    source.write_bytes(pickle.dumps((priors, bound, KEY)))
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", IN_ANOTHER_PROCESS, source, result]
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        assert bits(pickle.loads(result.read_bytes())) == bits(expected)
