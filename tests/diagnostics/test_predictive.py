"""Posterior predictive checks pass data that the model makes and reject other data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sbi_flows as sf
from sbi_flows.diagnostics import predictive

KEY = jax.random.key(0)


def run_check(posterior, simulator, x, **options):
    return sf.predictive_check(KEY, posterior, x, simulator, progress=False, **options)


def twice(key, theta):
    """Simulate two measurements of theta; the posterior `First` uses only the first one."""
    x = theta[None] + 0.5 * jax.random.normal(key, (2, *theta.shape))
    return {"x": x[0], "again": x[1]}


class First:
    """The exact posterior given the first of two measurements."""

    def __init__(self, posterior):
        self.posterior, self.prior = posterior, posterior.prior

    def sample(self, key, x, n):
        return self.posterior.sample(key, x["x"], n)


def test_data_of_the_model_pass(gaussian, simulator):
    found = run_check(gaussian(), simulator, jnp.array([0.3, -0.8]))
    assert found.entry_p.min() > 0.1 and found.distance_p > 0.1
    # the observation is .2 of itself off the predictive mean, whose sd is sqrt(.25 + .2)
    np.testing.assert_allclose(found.observed, np.array([0.06, -0.16]) / 0.45**0.5, atol=0.12)
    assert found.simulated.shape == (1_000, 2)
    assert found.labels == ("x[0]", "x[1]")


@pytest.mark.release
def test_levels_are_kept(gaussian):
    """P-values of data that the posterior has not used are uniform."""
    posterior = First(gaussian())
    sims = sf.simulate(jax.random.key(1), posterior.prior, twice, 200, progress=False)
    rows = (jax.tree.map(lambda leaf, i=i: leaf[i], sims.x) for i in range(200))
    found = [run_check(posterior, twice, x, draws=200) for x in rows]
    unseen = np.array([f.entry_p[:2] for f in found])
    assert found[0].labels == ("again[0]", "again[1]", "x[0]", "x[1]")
    assert 0.02 < np.mean(unseen < 0.1) < 0.18
    assert 0.4 < np.mean(unseen < 0.5) < 0.6
    assert np.mean([f.distance_p < 0.1 for f in found]) < 0.15


def test_an_entry_that_does_not_fit_is_named(gaussian):
    x = {"x": jnp.array([0.3, 0.2]), "again": jnp.array([0.1, 4.0])}
    found = run_check(First(gaussian()), twice, x)
    assert found.worst_p < 0.01 and found.distance_p < 0.01
    lines = found.summary().splitlines()
    assert lines[0].startswith("predictive check with 1000 simulations: distance p 0.00")
    assert lines[2].split()[0] == "again[1]"
    assert repr(found) == found.summary()
    assert found.to_dict()["entry_p"]["again[1]"] == pytest.approx(2 * 0.5 / 1001)


def test_a_combination_that_does_not_fit_is_seen_by_the_distance_alone(gaussian):
    """Each measurement alone is typical, but their difference is not: both share theta."""
    x = {"x": jnp.array([0.0, 0.0]), "again": jnp.array([0.0, 0.0])}
    wide = First(gaussian(blind=True))
    assert run_check(wide, twice, x).distance_p > 0.5
    far = {"x": jnp.array([1.6, 0.0]), "again": jnp.array([-1.6, 0.0])}
    found = run_check(wide, twice, far)
    assert found.distance_p < 0.01
    assert found.entry_p.min() > 0.05


def test_tied_values_are_in_the_middle():
    counts = jnp.array([[0.0], [0.0], [0.0], [1.0]])
    found = predictive._compare(counts, jnp.zeros((1, 1)), 0)
    assert found.entry_p == pytest.approx(2 * (0.375 * 4 + 0.5) / 5)
    assert found.labels == ("x[0]",)


def test_failures_are_counted_and_too_many_refused(gaussian):
    def failing_above(limit):
        return lambda key, theta: jnp.where(theta > limit, jnp.nan, theta)

    x = jnp.zeros(2)
    with pytest.warns(sf.SbiFlowsWarning, match="gave NaN or infinity"):
        found = run_check(gaussian(), failing_above(1.0), x)
    assert 0 < found.num_failed < 100
    assert f"{found.num_failed} simulations failed" in found.summary()
    assert len(found.simulated) == 1_000 - found.num_failed
    with (
        pytest.warns(sf.SbiFlowsWarning),
        pytest.raises(sf.SimulationFailed, match="of 1000 simulations at draws"),
    ):
        run_check(gaussian(), failing_above(-0.5), x)


def test_bad_input_is_refused(gaussian, simulator):
    with pytest.raises(ValueError, match="x: expected one observation, got a batch"):
        run_check(gaussian(), simulator, jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="draws: expected"):
        run_check(gaussian(), simulator, jnp.zeros(2), draws=10)


def test_the_picture_shows_the_observation(gaussian, simulator):
    found = run_check(gaussian(), simulator, jnp.array([0.3, -0.8]), draws=100)
    axes = found.plot()
    (line,) = [line for line in axes.lines if line.get_label() == "observed"]
    np.testing.assert_allclose(line.get_ydata(), found.observed, rtol=1e-6)


def test_the_earlier_order_of_arguments_is_accepted(gaussian, simulator):
    x = jnp.array([0.3, -0.8])
    expected = run_check(gaussian(), simulator, x, draws=100)
    options = {"draws": 100, "progress": False}
    by_position = sf.predictive_check(KEY, gaussian(), simulator, x, **options)
    by_name = sf.predictive_check(KEY, gaussian(), simulator=simulator, x=x, **options)
    for result in (by_position, by_name):
        np.testing.assert_array_equal(result.simulated, expected.simulated)
    with pytest.raises(ValueError, match="simulator: expected a function"):
        sf.predictive_check(KEY, gaussian(), x, x, **options)
