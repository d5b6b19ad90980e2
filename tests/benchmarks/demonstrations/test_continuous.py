"""Integrals of densities, and their agreement with draws."""

import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks.demonstrations.continuous import DENSITIES, Settings, density_study, markdown, run
from benchmarks.suite.records import BadInput
from simulators import two_moons

SPREAD = 0.1


class Fixed:
    """Posterior N(.3, .1^2) of both parameters for every x, its density multiplied by a factor."""

    def __init__(self, factor=1.0, spread=SPREAD):
        self._factor, self._spread = factor, spread

    def sample(self, key, _, n):
        return 0.3 + self._spread * jax.random.normal(key, (n, 2))

    def log_prob(self, theta, _):
        return jnp.log(self._factor) + jax.scipy.stats.norm.logpdf(theta, 0.3, SPREAD).sum(-1)


def study(posterior):
    result = density_study(jax.random.key(0), posterior, two_moons(), observations=1, draws=10_000)
    return {name: values[0] for name, values in result.items()}


def test_a_density_and_its_own_draws_agree():
    found = study(Fixed())
    assert found["integral"] == pytest.approx(1.0, abs=1e-3)
    # about 50 of 10,000 draws lie under a kernel, a relative noise of 1/7
    assert abs(found["bias"]) < 0.05
    assert found["gap"] < 0.15


def test_a_density_that_is_too_large_is_detected():
    found = study(Fixed(factor=1.1))
    assert found["integral"] == pytest.approx(1.1, abs=1e-3)
    assert found["bias"] - study(Fixed())["bias"] == pytest.approx(-math.log(1.1), abs=1e-3)


def test_draws_from_another_distribution_are_detected():
    assert study(Fixed(spread=0.2))["gap"] > 3 * study(Fixed())["gap"]


def test_unknown_names_are_refused():
    with pytest.raises(BadInput, match=r"--densities: expected names out of NSF.*got Flow"):
        Settings(densities=("Flow",))


@pytest.mark.release
def test_the_command_writes_a_record(tmp_path, monkeypatch):
    import sbi_flows as sf

    small = {"network": sf.Film(width=8, blocks=1)}
    monkeypatch.setitem(DENSITIES, "FlowMatching", lambda: sf.FlowMatching(**small))
    settings = Settings(
        results=tmp_path,
        densities=("FlowMatching",),
        budget=200,
        observations=1,
        draws=2_000,
        repeats=1,
        peer_epochs=0,
    )
    record = run(settings)
    assert 0.9 < record["densities"]["FlowMatching"]["integral"][0] < 1.1
    assert markdown(record)[2].startswith("| `FlowMatching` | ")
    assert len(list(tmp_path.glob("continuous-*.json"))) == 1
