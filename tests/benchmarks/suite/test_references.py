"""`python -m benchmarks references`: missing references are drawn; samplers are compared."""

import dataclasses
import json
import re

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import simulators
from benchmarks.__main__ import main
from benchmarks.suite import references
from simulators import Task
from simulators.adapters import mcmc, stored

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


@pytest.mark.release
def test_only_missing_references_are_drawn(toy, tmp_path, capsys):
    assert references.run(tmp_path, ("sir",)) == 2
    assert re.search(r"sir 2: rhat [01]\.?\d*, ess", capsys.readouterr().err)
    with np.load(tmp_path / "sir-1.npz", allow_pickle=False) as file:
        assert file["draws"].shape == (400, 1)
        assert file["rhat"] < 1.02 and file["ess"] > 100 and file["diverged"] == 0
        expected = float(file["x"][0]) / 1.25
        assert np.mean(file["draws"]) == pytest.approx(expected, abs=0.1)
    (tmp_path / "sir-2.npz").write_text("unreadable")
    assert references.run(tmp_path, ("sir",)) == 1
    assert references.run(tmp_path, ("sir",)) == 0
    assert stored.load("sir", 2, np.asarray(TOY.observation(2)), (tmp_path,)) is not None


@pytest.mark.parametrize("name", ["three_moons", "two_moons", "bernoulli_glm_raw"])
def test_tasks_without_a_file_of_their_own_are_refused(tmp_path, capsys, name):
    assert main(["references", "--tasks", name, "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--tasks: expected names out of bernoulli_glm, lotka_volterra, lynx_hare, sir" in error
    assert error.count("\n") == 1


@pytest.mark.release
def test_samplers_are_compared_with_given_draws(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x = np.full(10, 0.2)
    exact = x / 2 + np.sqrt(0.05) * rng.normal(size=(600, 10))
    given = {"x_1": x, "posterior_1": exact, "x_2": x, "posterior_2": exact + 1.0}
    np.savez(tmp_path / "gaussian_linear.npz", **given)
    out = tmp_path / "out"
    assert main(["references", "--check", str(tmp_path), "--results", str(out)]) == 0
    record = json.loads((out / "references-check.json").read_text())
    good, bad = record["c2st"]["gaussian_linear"]
    assert 0.4 < good < 0.6 and bad > 0.95
    assert f"{good:.3f}, {bad:.3f}" in capsys.readouterr().out


def test_given_draws_that_cannot_be_read_are_refused(tmp_path, capsys):
    def error(*options):
        arguments = ["references", "--check", str(tmp_path), "--results", str(tmp_path / "out")]
        assert main([*arguments, *options]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert "--check: expected a file <task>.npz of one of the tasks in" in error()
    assert "--tasks: expected names out of" in error("--tasks", "three_moons")
    assert "--check: cannot read" in error("--tasks", "two_moons")
    (tmp_path / "slcp.npz").write_text("spoilt")
    assert "--check: cannot read" in error()
