"""Scores against known values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from benchmarks.suite import scores
from sbi_flows.prior import as_prior
from simulators import Task


def test_mmd_is_unbiased_and_sees_a_shift_in_any_units():
    rng = np.random.default_rng(0)
    null = [scores.mmd(*rng.normal(size=(2, 300, 2))) for _ in range(100)]
    assert abs(np.mean(null)) < 3 * np.std(null) / np.sqrt(100)
    reference, samples = rng.normal(size=(2, 300, 2))
    apart = scores.mmd(reference, samples + 0.5)
    assert apart > 5 * np.std(null)
    units = np.array([1e-3, 1e4])
    moved = scores.mmd(reference * units, (samples + 0.5) * units)
    assert moved == pytest.approx(apart, rel=1e-3)


@dataclasses.dataclass(frozen=True)
class Known:
    """Posterior with a known density, multiplied by a factor."""

    prior: object
    density: object
    factor: float = 1.0
    needs_ode: bool = False

    def log_prob(self, theta, x):
        return jnp.sum(self.density.log_prob(theta), axis=-1) + jnp.log(self.factor)


@pytest.mark.parametrize(
    ("prior", "density"),
    [
        (dist.Uniform(-1.0, 1.0).expand([2]), dist.TruncatedNormal(0.3, 0.2, low=-1.0, high=1.0)),
        (dist.Normal(0.0, 1.0), dist.Normal(0.5, 0.1)),
        # far narrower than the steps of a grid over the whole prior
        (dist.Normal(0.0, 1.0).expand([2]), dist.Normal(0.5, 1e-4)),
    ],
)
def test_a_density_integrates_to_one_and_a_wrong_one_does_not(prior, density):
    for factor in (1.0, 2.0):
        known = Known(as_prior(prior), density, factor)
        draws = density.sample(jax.random.key(0), (2_000, known.prior.dim))
        found = scores.normalisation(known, None, draws)
        assert found == pytest.approx(factor, rel=5e-3)


def test_more_than_two_dimensions_are_not_integrated():
    known = Known(as_prior(dist.Normal(0, 1).expand([3])), None)
    assert scores.normalisation(known, None, np.zeros((5, 3))) is None


def test_the_held_out_loss_is_that_of_the_density():
    prior = as_prior(dist.Normal(0.0, 1.0))
    task = Task(name="toy", prior=prior, simulator=lambda key, theta: theta, citation="none")
    loss = scores.held_out_loss(jax.random.key(0), Known(prior, dist.Normal(0.0, 1.0)), task, 4000)
    assert loss == pytest.approx(0.5 * np.log(2 * np.pi * np.e), abs=0.05)
