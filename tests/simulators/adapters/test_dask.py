"""External simulators on a Dask cluster, one of whose workers is killed."""

import os
import signal

import jax
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from simulators import external_simulator

pytestmark = pytest.mark.promotes

PRIOR = {"place": dist.Uniform(0.0, 1.0)}


@pytest.fixture(scope="module")
def client():
    from dask.distributed import Client, LocalCluster

    settings = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(**settings) as cluster, Client(cluster) as client:
        yield client


def noisy(seed, theta):
    return theta["place"] + np.random.default_rng(seed).normal(size=2)


def simulated(function, executor):
    simulator = external_simulator(function, shape=(2,))
    key = jax.random.key(0)
    return sf.simulate(key, PRIOR, simulator, 60, executor=executor, progress=False)


def test_a_killed_worker_loses_no_row(client, tmp_path):
    def deadly(seed, theta):
        try:
            (tmp_path / "killed").touch(exist_ok=False)
        except FileExistsError:
            return noisy(seed, theta)
        os.kill(os.getppid(), signal.SIGKILL)
        return noisy(seed, theta)

    alone = simulated(noisy, sf.Processes(workers=1))
    shared = simulated(deadly, sf.Dask(client=client, rows=5))
    assert (tmp_path / "killed").exists()
    assert shared.num_valid == 60
    np.testing.assert_array_equal(shared.x, alone.x)


def test_an_address_will_do_and_failed_rows_say_why(client):
    def failing(seed, theta):
        if theta["place"] > 0.9:
            raise ArithmeticError("too far")
        return noisy(seed, theta)

    executor = sf.Dask(client=client.scheduler.address, rows=7)
    with pytest.warns(sf.SbiFlowsWarning, match="raised ArithmeticError: too far"):
        sims = simulated(failing, executor)
    np.testing.assert_array_equal(sims.valid, np.asarray(sims.theta)[:, 0] <= 0.9)
