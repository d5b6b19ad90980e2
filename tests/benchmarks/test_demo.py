"""The demonstration's own parts; the whole takes minutes and is `make demo`."""

import arviz as az
import jax
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from benchmarks import demo
from benchmarks.demo_figures import save_figures
from sbi_flows.diagnostics import check
from simulators import lynx_hare

LABELS = ("a", "b[0]", "b[1]")


def arviz_data(shift=0.0, scale=1.0):
    """Two chains of 500 draws; b[1] is spoilt."""
    rng = np.random.default_rng(0)
    b = rng.normal(size=(2, 500, 2))
    b[..., 1] = scale * b[..., 1] + shift
    return az.from_dict(posterior={"b": b, "a": rng.normal(3.0, 2.0, size=(2, 500))})


def test_equal_posteriors_agree():
    compared = demo.comparison(arviz_data(), arviz_data(), LABELS)
    assert tuple(compared.index) == LABELS
    assert compared["mean"]["a"] == pytest.approx(3.0, abs=0.3)
    assert compared["sd"]["a"] == pytest.approx(2.0, abs=0.2)
    assert (compared["5%"] < compared["mean"]).all()
    assert (compared["95%"] > compared["mean"]).all()
    np.testing.assert_allclose(compared["shift/sd"], 0.0)
    np.testing.assert_allclose(compared["sd ratio"], 1.0)
    assert demo.within_targets(compared)


@pytest.mark.parametrize(
    "spoilt", [{"shift": 0.9}, {"shift": -0.9}, {"scale": 1.7}, {"scale": 0.6}]
)
def test_a_posterior_that_differs_does_not_agree(spoilt):
    compared = demo.comparison(arviz_data(**spoilt), arviz_data(), LABELS)
    assert not demo.within_targets(compared)
    assert demo.within_targets(compared.drop("b[1]"))
    sd = compared["NUTS sd"]["b[1]"]
    assert compared["shift/sd"]["b[1]"] == pytest.approx(abs(spoilt.get("shift", 0)) / sd, abs=0.1)
    assert compared["sd ratio"]["b[1]"] == pytest.approx(spoilt.get("scale", 1.0))


def test_draws_come_back_in_the_priors_order():
    prior = sf.as_prior({"a": dist.Normal(0, 1), "b": dist.Normal(0, 1).expand([2]).to_event(1)})
    data = arviz_data()
    rows = demo.flat_draws(data, prior)
    assert prior.labels == LABELS
    assert rows.shape == (1000, 3)
    np.testing.assert_array_equal(
        rows[500], [data.posterior["a"][1, 0], *data.posterior["b"][1, 0]]
    )


@pytest.fixture(scope="module")
def fitted():
    """A posterior too crude to be of use, with its check and history."""
    task = lynx_hare()
    sims = sf.simulate(jax.random.key(0), task.prior, task.simulator, 200, progress=False)
    density = sf.NSF(transforms=1, bins=2, hidden=(8,), context_width=0, dropout=0.0)
    npe = sf.NPE(task.prior, density, training=sf.Training(max_epochs=2), members=1)
    posterior, history = npe.fit(jax.random.key(1), sims, progress=False)
    report = check(jax.random.key(2), posterior, task.simulator, datasets=50, draws=20)
    return task, posterior, history, report


def test_figures_are_written(fitted, tmp_path):
    task, posterior, history, report = fitted
    x = task.observation(1)
    draws = np.asarray(posterior.sample(jax.random.key(3), x, 100))
    predictions = demo._predict(jax.random.key(4), task, posterior.prior, draws[:50])
    both = {"NPE": draws, "NUTS": draws}
    files = save_figures(tmp_path, posterior.prior.labels, both, x, predictions, report, history)
    assert [f.name for f in files] == ["corner.png", "predictive.png", "check.png", "losses.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)
    assert min(f.stat().st_size for f in files) > 10_000
