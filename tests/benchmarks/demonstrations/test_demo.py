"""Parts of the lynx and hare demonstration; `make demo` runs all of it in minutes."""

from types import SimpleNamespace

import arviz as az
import jax
import matplotlib.figure
import matplotlib.pyplot
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from benchmarks.demonstrations import demo
from benchmarks.demonstrations.demo_figures import save_figures
from simulators.gallery.lynx_hare import PELTS

LABELS = ("a", "b[0]", "b[1]")


def arviz_data(shift=0.0, scale=1.0):
    """Make two chains of 500 draws, with b[1] shifted and scaled."""
    rng = np.random.default_rng(0)
    b = rng.normal(size=(2, 500, 2))
    b[..., 1] = scale * b[..., 1] + shift
    groups = {"posterior": {"b": b, "a": rng.normal(3.0, 2.0, size=(2, 500))}}
    return az.from_dict(**groups) if int(az.__version__[0]) < 1 else az.from_dict(groups)


@pytest.mark.newest
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
    "change", [{"shift": 0.9}, {"shift": -0.9}, {"scale": 1.7}, {"scale": 0.6}]
)
def test_a_posterior_that_differs_does_not_agree(change):
    compared = demo.comparison(arviz_data(**change), arviz_data(), LABELS)
    assert not demo.within_targets(compared)
    assert demo.within_targets(compared.drop("b[1]"))
    sd = compared["NUTS sd"]["b[1]"]
    assert compared["shift/sd"]["b[1]"] == pytest.approx(abs(change.get("shift", 0)) / sd, abs=0.1)
    assert compared["sd ratio"]["b[1]"] == pytest.approx(change.get("scale", 1.0))


def test_draws_come_back_in_the_priors_order():
    prior = sf.as_prior({"a": dist.Normal(0, 1), "b": dist.Normal(0, 1).expand([2]).to_event(1)})
    data = arviz_data()
    rows = demo.flat_draws(data, prior)
    assert prior.labels == LABELS
    assert rows.shape == (1000, 3)
    np.testing.assert_array_equal(
        rows[500], [data.posterior["a"][1, 0], *data.posterior["b"][1, 0]]
    )


def test_there_is_one_prediction_a_draw():
    prior = sf.as_prior({"a": dist.Normal(0, 1), "b": dist.Normal(0, 1).expand([2]).to_event(1)})

    def simulator(key, theta):
        return theta["a"] + theta["b"] + 1e-3 * jax.random.normal(key, (2,))

    draws = np.array([[1.0, 10.0, 20.0], [2.0, 30.0, 40.0]])
    found = demo._predict(jax.random.key(0), SimpleNamespace(simulator=simulator), prior, draws)
    np.testing.assert_allclose(found, [[11.0, 21.0], [32.0, 42.0]], atol=0.01)
    assert not np.array_equal(found[0] - [11, 21], found[1] - [32, 42])


def test_figures_are_written(tmp_path):
    rng = np.random.default_rng(0)
    draws = {name: rng.normal(size=(200, 3)) for name in ("NPE", "NUTS")}
    history = sf.History(
        train_loss=np.array([[2.0], [1.0]]),
        validation_loss=np.array([[2.1], [1.1]]),
        start_loss=np.array([3.0]),
        held_out=np.array([[0, 1]]),
        held_out_loss=np.array([[1.0, 1.2]]),
        best_epoch=np.array([2]),
        epochs=2,
        seconds=1.0,
        stop_reason="max_epochs",
    )
    report = SimpleNamespace(plot=matplotlib.figure.Figure)
    predictions = np.log(PELTS)[None] + rng.normal(size=(50, 21, 2))
    # earlier tests and doctests of this process may have left figures open
    before = matplotlib.pyplot.get_fignums()
    files = save_figures(tmp_path, LABELS, draws, np.log(PELTS), predictions, report, history)
    assert [f.name for f in files] == ["corner.png", "predictive.png", "check.png", "losses.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)
    assert matplotlib.pyplot.get_fignums() == before
