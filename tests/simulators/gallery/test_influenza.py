"""The influenza epidemic as a stochastic simulator and as an ODE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sbi_flows as sf
from simulators import influenza, influenza_ode
from simulators.gallery.influenza import BOYS, COUNTS, boys_in_bed, expected_in_bed

THETA = {"r0": 4.0, "before": 1.0, "in_bed": 2.2, "first": 3.0}


def test_the_counts_are_those_that_were_published():
    assert COUNTS.sum() == 1559
    assert (COUNTS.max(), COUNTS.argmax()) == (298, 5)
    np.testing.assert_array_equal(influenza().observation(1), COUNTS)


def test_many_epidemics_are_around_the_expected_one():
    several = np.mean([boys_in_bed(seed, THETA | {"first": 40.0}) for seed in range(200)], axis=0)
    expected = np.asarray(expected_in_bed({**THETA, "first": jnp.float32(40.0)}))
    # the time steps differ, and chance delays an epidemic
    assert np.corrcoef(several, expected)[0, 1] > 0.99
    assert several.sum() == pytest.approx(expected.sum(), rel=0.1)


def test_an_epidemic_has_no_more_boys_than_the_school():
    for seed in range(20):
        counts = boys_in_bed(seed, THETA | {"r0": 30.0, "in_bed": 50.0, "first": 2_000.0})
        assert counts.min() >= 0 and counts.max() <= BOYS
    # no infection without contact: those who are infectious at first fall ill, and recover
    assert boys_in_bed(0, THETA | {"r0": 1e-9}).max() <= 12


@pytest.mark.promotes
def test_it_runs_in_processes_and_the_same_seeds_give_the_same():
    task = influenza()
    sims = sf.simulate(jax.random.key(0), task.prior, task.simulator, 30, progress=False)
    assert sims.x.shape == (30, 14) and sims.num_valid == 30
    alone = sf.simulate(
        jax.random.key(0),
        task.prior,
        task.simulator,
        30,
        executor=sf.Processes(workers=1),
        progress=False,
    )
    np.testing.assert_array_equal(sims.x, alone.x)


@pytest.mark.slow
@pytest.mark.promotes
def test_the_exact_posterior_of_the_ode_explains_the_counts():
    task = influenza_ode()
    draws = np.asarray(task.reference(1, 400))
    mean = dict(zip(task.labels, draws.mean(axis=0), strict=True))
    assert 2.0 < mean["r0"] < 5.0
    assert 2.0 < mean["in_bed"] < 4.0
    theta = {k: jnp.float32(v) for k, v in mean.items()}
    assert np.corrcoef(expected_in_bed(theta), COUNTS)[0, 1] > 0.98
