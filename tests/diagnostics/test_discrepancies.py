"""User-defined discrepancies: exact tail probabilities, and errors before any simulation."""

import inspect
import json
import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import pytest
from flax import nnx
from scipy.stats import norm

import sbi_flows as sf
from sbi_flows.diagnostics.discrepancies import trace_discrepancies, two_sided_p_values
from sbi_flows.diagnostics.predictive import _distance_p
from sbi_flows.prior.prior import as_prior
from tests.gaussian import NOISE

KEY = jax.random.key(0)
X = jnp.array([1.0, -2.0])


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def run_check(posterior, simulator, discrepancies, x=X, draws=4_000):
    return sf.predictive_check(
        KEY, posterior, x, simulator, discrepancies=discrepancies, draws=draws, progress=False
    )


def test_tail_probabilities_are_those_of_the_predictive_distribution(gaussian, simulator):
    tests = {"difference": lambda x: x[0] - x[1], "place": lambda x: jnp.argmax(x)}
    found = run_check(gaussian(), simulator, tests).discrepancies
    # x has the mean .8 x_o and the variance .25 + .2 in each entry
    z = 0.2 * 3.0 / (2 * 0.45) ** 0.5
    assert found.p[0] == pytest.approx(2 * norm.sf(z), abs=0.03)
    assert np.all(found.observed[:, 0] == 3.0)
    np.testing.assert_allclose(np.std(found.simulated[:, 0]), 0.9**0.5, rtol=0.05)
    # argmax takes the observed one of two values with probability q; ties count half
    q = norm.cdf(2.4 / 0.9**0.5)
    assert found.p[1] == pytest.approx(min(1.0, 2 * min(0.5 * q, 1 - 0.5 * q)), abs=0.03)


def test_only_the_discrepancy_of_the_wrong_entry_rejects(gaussian, simulator):
    posterior = gaussian(shift=(6.0, 0.0))
    found = run_check(posterior, simulator, {"first": lambda x: x[0], "second": lambda x: x[1]})
    first, second = found.discrepancies.p
    assert first < 0.01 < 0.2 < second
    np.testing.assert_allclose(found.discrepancies.adjusted, [2 * first, second])


def test_numpy_functions_that_jax_can_trace_are_accepted(gaussian, simulator):
    found = run_check(gaussian(), simulator, {"a": np.max, "b": jnp.max}, draws=200).discrepancies
    np.testing.assert_array_equal(found.simulated[:, 0], found.simulated[:, 1])
    with pytest.raises(ValueError, match="expected a function that JAX can trace"):
        run_check(gaussian(), simulator, {"a": np.ptp})


def test_discrepancies_of_the_parameters_are_compared_draw_by_draw(gaussian, simulator):
    """Squared residuals of a simulation are chi-squared; those of the observation are larger."""

    def residual(x, theta):
        return jnp.sum((x - theta["a"]) ** 2) / NOISE**2

    class Named:
        prior = as_prior({"a": dist.Normal(0, 1).expand([2])})
        sample = staticmethod(gaussian().sample)

    found = run_check(Named(), lambda k, t: simulator(k, t["a"]), {"chi2": residual}).discrepancies
    assert np.ptp(found.observed[:, 0]) > 0
    # x_o - theta ~ N(.2 x_o, .2 I) against x - theta ~ N(0, .25 I), sampled directly
    rng = np.random.default_rng(1)
    observed = np.sum((0.2 * np.asarray(X) + 0.2**0.5 * rng.normal(size=(200_000, 2))) ** 2, axis=1)
    simulated = np.sum(0.25 * rng.normal(size=(200_000, 2)) ** 2, axis=1)
    share = np.mean(simulated < observed)
    assert found.p[0] == pytest.approx(2 * min(share, 1 - share), abs=0.03)
    np.testing.assert_allclose(np.mean(found.simulated), 2.0, rtol=0.08)


def test_two_sided_counts_both_sides_and_ties():
    simulated = np.arange(99.0)[:, None]
    assert two_sided_p_values(simulated, np.array([[49.0]]))[0] == pytest.approx(1.0)
    assert two_sided_p_values(simulated, np.array([[-1.0]]))[0] == pytest.approx(2 * 0.5 / 100)
    assert two_sided_p_values(simulated, np.array([[200.0]]))[0] == pytest.approx(2 * 0.5 / 100)
    assert two_sided_p_values(np.ones((99, 1)), np.ones((1, 1)))[0] == 1.0


def test_dict_observations_and_failed_simulations_are_accepted(gaussian):
    def simulate(key, theta):
        x = theta + NOISE * jax.random.normal(key, (2,))
        return {"x": jnp.where(x[0] < 0.2, jnp.nan, x), "n": (x[0] > 0).astype(int)}

    class Of:
        prior = gaussian().prior

        def sample(self, key, x, n):
            return gaussian().sample(key, x["x"], n)

    x = {"x": X, "n": jnp.asarray(1)}
    tests = {"both": lambda x, theta: x["x"][0] - theta[0] + x["n"]}
    with pytest.warns(sf.SbiFlowsWarning, match="gave NaN or infinity"):
        found = run_check(Of(), simulate, tests, x=x, draws=1_000)
    assert found.num_failed > 0
    assert len(found.discrepancies.observed) == 1_000 - found.num_failed
    assert np.isfinite(found.discrepancies.simulated).all()


def test_the_report_has_the_discrepancies(gaussian, simulator):
    tests = {"peak": lambda x: x.max(), "off": lambda x, theta: x[0] - theta[0]}
    found = run_check(gaussian(), simulator, tests, draws=1_000)
    lines = found.summary().splitlines()
    assert lines[-3].split() == ["observed", "simulated", "90%", "p", "p", "(Holm)"]
    assert lines[-2].split()[:2] == ["peak", "1"]
    plain = json.loads(json.dumps(found.to_dict()))["discrepancies"]
    assert plain["peak"]["p"] == found.discrepancies.p[0]
    assert plain["off"]["simulated_quantiles"]["0.5"] == pytest.approx(0, abs=0.1)
    figure = found.discrepancies.plot()
    assert [ax.get_title().split(":")[0] for ax in figure.axes] == ["peak", "off"]
    assert figure.axes[0].lines[0].get_xdata()[0] == 1.0
    none = sf.predictive_check(KEY, gaussian(), X, simulator, draws=1_000, progress=False)
    assert none.discrepancies is None and none.to_dict()["discrepancies"] is None


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ({}, "expected a dict of functions by name"),
        ({"a": lambda x: x}, r"expected one real number, got \(2,\)"),
        ({"a": lambda x: x[0] + 1j}, "expected one real number"),
        ({"a": lambda x, y, z: x[0]}, "expected a function of x, or of x and theta, got 3"),
        ({"a": lambda x: x[0] if x[0] > 0 else x[1]}, "expected a function that JAX can trace"),
    ],
)
def test_invalid_discrepancies_are_refused_before_any_simulation(gaussian, tests, message):
    def never(key, theta):
        raise AssertionError("simulated")

    with pytest.raises(ValueError, match=message):
        run_check(gaussian(), never, tests)


def test_names_must_be_strings():
    past_types = inspect.unwrap(trace_discrepancies)
    with pytest.raises(ValueError, match=r"discrepancies\[1\]: expected a str name and a function"):
        past_types({1: lambda x: x[0]}, as_prior(dist.Normal(0, 1)), X)


def test_a_discrepancy_of_nan_is_an_error(gaussian, simulator):
    with pytest.raises(sf.SbiFlowsError, match=r"discrepancies\['log'\]: gave NaN at \d+ of 4000"):
        run_check(gaussian(), simulator, {"log": lambda x: jnp.log(x[0])})


class Summaries(nnx.Module):
    """An embedding that returns the mean and the log standard deviation of the data."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return self.scale[...] * jnp.stack([x.mean(axis=1), jnp.log(x.std(axis=1) + 1e-3)], axis=1)


@pytest.mark.slow
def test_the_distance_is_also_computed_in_the_embedding():
    """Six equal numbers have typical values but no scatter; only the embedding shows this."""
    prior = {"a": dist.Normal(0, 1)}

    def simulate(key, theta):
        return theta["a"] + jax.random.normal(key, (6,))

    sims = sf.simulate(KEY, prior, simulate, 500, progress=False)
    npe = sf.NPE(prior, sf.MAF(), embedding=Summaries, training=sf.Training(max_epochs=1))
    posterior, _ = npe.fit(KEY, sims, progress=False)
    x = jnp.full(6, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sf.SbiFlowsWarning)  # the observation is not typical
        found = sf.predictive_check(KEY, posterior, x, simulate, draws=400, progress=False)
    assert found.embedding_p < 0.02 < 0.9 < found.distance_p
    assert f"in the embedding {found.embedding_p:.3f}" in found.summary()
    assert found.to_dict()["embedding_p"] == found.embedding_p
    typical = sf.predictive_check(KEY, posterior, sims.x[0], simulate, draws=400, progress=False)
    assert typical.embedding_p > 0.05


def test_a_distance_of_the_bulk_is_typical():
    rows = np.random.default_rng(0).normal(size=(400, 3))
    assert _distance_p(rows, np.zeros(3)) > 0.9 > 0.05 > _distance_p(rows, np.full(3, 5.0))
