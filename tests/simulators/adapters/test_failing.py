"""A simulator that fails in seven ways at 5% of its draws: simulate, fit and check."""

import os
import re
import signal
import time

import jax
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.simulations.executors import row_seeds
from simulators import external_simulator
from tests import cases

pytestmark = pytest.mark.slow

PRIOR = {"place": dist.Normal(0.0, 1.0)}
KEY = jax.random.key(2)
SHARE = 0.0072
"""Fraction of the draws in each kind of failure, and of the valid draws that print a lot."""

WAYS = {
    "raises": "raised ArithmeticError: no such state",
    "hangs": "was stopped after 5 s",
    "wrong shape": r"raised ValueError: expected numbers of shape \(2,\), got float64 of shape",
    "segfaults": "its process was ended by SIGSEGV",
    "exits": "its process ended with status 7",
    "eats memory": "ran out of memory",
    "gives NaN": "gave NaN or infinity",
}


def way_of(seed):
    """Return the kind of failure of the draw with this seed, "prints" or "is quiet"."""
    place = int(np.random.default_rng([seed, 1]).uniform() / SHARE)
    return [*WAYS, "prints", "is quiet"][min(place, len(WAYS) + 1)]


@external_simulator(shape=(2,), timeout=5.0, memory=0.5, executor=sf.Processes(workers=2))
def failing(seed, theta):
    way = way_of(seed)
    if way == "raises":
        raise ArithmeticError("no such state")
    if way == "hangs":
        time.sleep(600)
    if way == "wrong shape":
        return np.zeros(5)
    if way == "segfaults":
        os.kill(os.getpid(), signal.SIGSEGV)
    if way == "exits":
        os._exit(7)
    if way == "eats memory":
        return np.ones(2**34, np.uint8)[:2].astype(float)
    if way == "gives NaN":
        return np.array([0.0, np.nan])
    if way == "prints":
        print("step 1 of 1\n" * 1_000)
    return theta["place"] + 0.5 * np.random.default_rng(seed).normal(size=2)


def test_the_run_ends_and_the_posterior_has_its_verdict():
    n = 1_000
    with pytest.warns(sf.SbiFlowsWarning, match=" of 1000 simulations failed: ") as caught:
        sims = sf.simulate(KEY, PRIOR, failing, n, progress=False)
    # every row that should fail has failed, and no other one
    ways = np.array([way_of(s) for s in row_seeds(jax.random.split(jax.random.split(KEY)[1], n))])
    fine = np.isin(ways, ["is quiet", "prints"])
    np.testing.assert_array_equal(sims.valid, fine)
    assert 0.93 < fine.mean() < 0.97 and np.sum(ways == "prints") > 0
    # each for its own reason, all of which the warning counts
    (said,) = [str(w.message) for w in caught]
    for way, reason in WAYS.items():
        count = np.sum(ways == way)
        assert count > 0
        assert re.search(rf"\b{count} {reason}", said), (way, said)
    training = sf.Training(max_epochs=10)
    npe = sf.NPE(PRIOR, cases.DENSITIES["MAF"], training=training, members=1)
    posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
    # failures here say nothing of the parameter: the posterior is that of the whole prior
    x = np.array([1.0, 0.5], np.float32)
    draws = np.asarray(posterior.sample(jax.random.key(2), x, 4_000))
    assert draws.mean() == pytest.approx(1.5 / 2.25, abs=0.1)
    assert draws.std() == pytest.approx((1.0 / 9.0) ** 0.5, rel=0.1)
    with pytest.warns(sf.SbiFlowsWarning, match=" of 400 simulations failed: "):
        report = sf.check(jax.random.key(3), posterior, failing, datasets=400, progress=False)
    assert 5 < report.num_failed < 40 and report.num_datasets + report.num_failed == 400
    assert report.calibrated
    assert report.verdict.startswith("calibrated: none of 5 tests rejects")
    about = f"about the {report.num_datasets} of 400 simulations that did not fail"
    assert report.verdict.splitlines()[0].endswith(about)
    assert about in re.sub(r"\s+", " ", report.summary())
