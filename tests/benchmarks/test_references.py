"""`python -m benchmarks references`: makes what is missing, and that alone."""

import dataclasses
import re

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import simulators
from benchmarks import references
from benchmarks.__main__ import main
from simulators import Task, mcmc, stored

pytestmark = pytest.mark.promotes


def model(x):
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
    numpyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)


TOY = Task(
    name="sir",
    prior=dist.Normal(0.0, 1.0).expand([1]).to_event(1),
    simulator=lambda key, theta: theta + 0.5,
    citation="",
    num_observations=2,
    stored_as="sir",
    sample_reference=mcmc.NutsReference(model, ("theta",)),
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(simulators, "get", lambda name: dataclasses.replace(TOY, name=name))
    monkeypatch.setattr(references, "DRAWS", 400)


def test_only_what_is_missing_is_made(toy, tmp_path, capsys):
    assert references.run(tmp_path, ("sir",)) == 2
    assert re.search(r"sir 2: rhat [01]\.?\d*, ess", capsys.readouterr().err)
    with np.load(tmp_path / "sir-1.npz", allow_pickle=False) as file:
        assert file["draws"].shape == (400, 1)
        assert file["rhat"] < 1.02 and file["ess"] > 100 and file["diverged"] == 0
        expected = float(file["x"][0]) / 1.25
        assert np.mean(file["draws"]) == pytest.approx(expected, abs=0.1)
    (tmp_path / "sir-2.npz").write_text("spoilt")
    assert references.run(tmp_path, ("sir",)) == 1
    assert references.run(tmp_path, ("sir",)) == 0
    assert stored.load("sir", 2, np.asarray(TOY.observation(2)), (tmp_path,)) is not None


@pytest.mark.parametrize("name", ["three_moons", "two_moons", "bernoulli_glm_raw"])
def test_tasks_without_a_file_of_their_own_are_refused(tmp_path, capsys, name):
    assert main(["references", "--tasks", name, "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--tasks: expected names out of bernoulli_glm, lotka_volterra, lynx_hare, sir" in error
    assert error.count("\n") == 1
