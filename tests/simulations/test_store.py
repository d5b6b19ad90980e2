"""Stores: finished chunks survive kills and damage, and rows do not depend on chunks."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.simulations import numbered
from sbi_flows.simulations.chunks import SealedChunk
from sbi_flows.simulations.store import _gaps
from simulators import external_simulator
from tests import cases

pytestmark = pytest.mark.promotes

PRIOR = {"rate": dist.LogNormal(0.0, 1.0), "place": dist.Uniform(-1.0, 1.0).expand([2])}
KEY = jax.random.key(3)


def noisy(key, theta):
    noise = jax.random.normal(key, (3,))
    curve = jnp.append(theta["place"], theta["rate"]) + noise
    return {"curve": curve, "size": jnp.sum(curve)}


def outside(seed, theta):
    if theta["place"][0] > 0.8:
        raise ArithmeticError("too far")
    return theta["place"] + np.random.default_rng(seed).normal(size=2)


def stored(path, n=50, simulator=noisy, *, chunk=16, key=KEY, prior=PRIOR, **settings):
    store = sf.SimulationStore(path, chunk=chunk)
    return store, store.simulate(key, prior, simulator, n, progress=False, **settings)


def same(a, b):
    leaves = jax.tree.leaves((a.theta, a.x)), jax.tree.leaves((b.theta, b.x))
    for left, right in zip(*leaves, strict=True):
        np.testing.assert_array_equal(left[:], right[:])


def test_rows_do_not_depend_on_the_chunks_they_were_made_in(tmp_path):
    _, whole = stored(tmp_path / "whole")
    _, chunks = stored(tmp_path / "chunks", chunk=7)
    assert whole.on_disk and len(whole) == 50
    assert {k: (v.shape, v.dtype) for k, v in whole.x.items()} == {
        "curve": ((50, 3), np.float32),
        "size": ((50,), np.float32),
    }
    same(whole, chunks)
    # each row has noise of its own
    noise = np.asarray(whole.x["curve"][:]) - np.asarray(whole.theta)[:, [1, 2, 0]]
    assert np.unique(noise.round(5)).size == 150
    assert abs(noise.mean()) < 0.3 and abs(noise.std() - 1.0) < 0.2


def test_small_chunks_are_simulated_together(tmp_path, monkeypatch):
    made, simulate_call = [], numbered.simulate_call

    def spy(prior, simulator, keys, theta, mesh):
        made.append(len(keys))
        return simulate_call(prior, simulator, keys, theta, mesh)

    monkeypatch.setattr(numbered, "simulate_call", spy)
    store, sims = stored(tmp_path / "s", 300)
    assert made == [256, 256] and len(sims) == 300
    assert [c.count for c in store._sealed()] == [16] * 18 + [12]
    # those that are missing in the midst of others as well, and no more
    for start in (16, 32, 288):
        del store._rows[f"{start:012d}"]
    same(sims, stored(tmp_path / "s", 300)[1])
    assert made[2:] == [256, 256]


def test_a_store_grows_and_is_opened_again(tmp_path):
    stored(tmp_path / "grown", 10)
    _, grown = stored(tmp_path / "grown", 50)
    same(grown, stored(tmp_path / "at once")[1])
    again = sf.SimulationStore(tmp_path / "grown")
    assert len(again) == 50
    same(grown, again.simulations())
    # nothing is made again where there is enough

    def failing(*_):
        raise AssertionError("simulated again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sbi_flows.simulations.numbered.simulate_call", failing)
        assert len(again.simulate(KEY, PRIOR, noisy, 30)) == 50


@pytest.mark.filterwarnings("error")
def test_a_chunk_that_was_hardly_begun_is_not_missed(tmp_path):
    _, sims = stored(tmp_path / "s")
    (tmp_path / "s" / "rows" / "000000000050").mkdir()
    (tmp_path / "s" / "rows" / "000000000050" / "zarr.json.partial").touch()
    same(sims, sf.SimulationStore(tmp_path / "s").simulations())


@pytest.mark.filterwarnings("ignore:Object at theta is not recognized as a component")
def test_rows_are_counted_without_a_look_at_the_arrays(tmp_path):
    """Each chunk has several arrays, and a request for each of them to a remote store is slow."""
    stored(tmp_path / "s")
    for file in (tmp_path / "s").glob("rows/*/theta/zarr.json"):
        file.unlink()
    store = sf.SimulationStore(tmp_path / "s")
    assert len(store) == 50
    with pytest.raises(sf.StoreSpoilt, match="rows/000000000000"):
        store.simulations()


def test_what_is_asked_for_is_read_by_rows(tmp_path):
    _, sims = stored(tmp_path / "s", chunk=7)
    column, whole = sims.x["curve"], np.asarray(sims.x["curve"][:])
    rows = np.array([49, 0, 7, 7, 30])
    np.testing.assert_array_equal(column[rows], whole[rows])
    np.testing.assert_array_equal(column[5:20], whole[5:20])
    part = sims[rows]
    assert not part.on_disk
    np.testing.assert_array_equal(part.x["size"], np.asarray(sims.x["size"][:])[rows])


@pytest.mark.slow
def test_a_fit_reads_a_store_as_it_reads_arrays(tmp_path):
    prior = dist.Normal(0.0, 1.0).expand([1])
    _, sims = stored(
        tmp_path / "s", 400, lambda k, t: t + 0.5 * jax.random.normal(k, (1,)), prior=prior
    )
    npe = sf.NPE(prior, cases.DENSITIES["MAF"], training=sf.Training(max_epochs=5), members=1)
    posterior, _ = npe.fit(jax.random.key(0), sims, progress=False)
    draws = np.asarray(posterior.sample(jax.random.key(1), np.array([1.0]), 2000))
    assert draws.mean() == pytest.approx(0.8, abs=0.15)
    assert draws.std() == pytest.approx(np.sqrt(0.2), rel=0.2)


def test_failures_are_kept_with_their_reasons(tmp_path):
    simulator = external_simulator(outside, shape=(2,), executor=sf.Processes(workers=2))
    with pytest.warns(sf.SbiFlowsWarning, match="raised ArithmeticError: too far"):
        store, sims = stored(tmp_path / "s", 60, simulator)
    far = np.asarray(sims.theta)[:, 1] > 0.8
    assert 0 < far.sum() < 20
    np.testing.assert_array_equal(sims.valid, ~far)
    failures = store.failures()
    np.testing.assert_array_equal(failures.rows, np.flatnonzero(far))
    assert all("too far" in reason for reason in failures.reasons)
    # all of them in the highest third of that parameter
    np.testing.assert_allclose(failures.shares[1], [0.0, 0.0, far.sum() / 20])
    said = repr(failures)
    assert f"{far.sum()} of 60 simulations failed" in said
    assert "place[0]" in said and "highest third" in said
    assert len(failures.plot().axes) == 3
    # as they are without a store, and with another number of workers
    with pytest.warns(sf.SbiFlowsWarning, match="too far"):
        _, alone = stored(tmp_path / "t", 60, simulator, executor=sf.Processes(workers=1), chunk=9)
    same(sims, alone)


def elsewhere(key, theta):
    return theta["place"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prior": PRIOR | {"rate": dist.LogNormal(0.0, 2.0)}},
            "prior: expected that of the store",
        ),
        ({"simulator": elsewhere}, r"simulator: expected that of .*noisy.* got .*elsewhere"),
        ({"key": jax.random.key(4)}, r"key: expected that of the store .* \[0, 3\], got \[0, 4\]"),
        ({"n": 0}, "n: expected a whole number of at least 1, got 0"),
        ({"chunk": 0}, "chunk: expected a whole number of at least 1, got 0"),
    ],
)
def test_what_does_not_belong_to_a_store_is_refused(tmp_path, settings, message):
    stored(tmp_path / "s", 5)
    with pytest.raises(ValueError, match=message):
        stored(tmp_path / "s", **settings)
    assert len(sf.SimulationStore(tmp_path / "s")) == 5


def test_what_is_no_store_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a store")
    with pytest.raises(ValueError, match="path: expected a store or none, got"):
        sf.SimulationStore(tmp_path / "file")
    with pytest.raises(ValueError, match="expected a store with rows, got none"):
        sf.SimulationStore(tmp_path / "new").simulations()


def test_spoilt_rows_are_found_and_made_again(tmp_path):
    store, sims = stored(tmp_path / "s")
    store.verify()
    before = {k: v[:] for k, v in sims.x.items()}
    group = store._rows["000000000016"]
    group["x.size"][:] = group["x.size"][:] + 1
    with pytest.raises(sf.StoreSpoilt, match="the rows from 16 on are not those that were written"):
        store.verify()
    del store._rows["000000000016"]
    assert len(store) == 34
    _, again = stored(tmp_path / "s")
    for name, value in before.items():
        np.testing.assert_array_equal(again.x[name][:], value)


def test_a_store_may_be_anywhere_that_fsspec_knows():
    store, sims = stored("memory://somewhere/store.zarr", 20)
    assert len(store) == len(sims) == 20


def test_gaps_are_all_rows_that_are_missing():
    chunks = [SealedChunk(start, count, "", {}, None) for start, count in ((4, 4), (8, 2), (20, 5))]
    assert list(_gaps(chunks, 30)) == [(0, 4), (10, 20), (25, 30)]
    assert list(_gaps(chunks, 22)) == [(0, 4), (10, 20)]
    assert list(_gaps(chunks, 15)) == [(0, 4), (10, 15)]
    assert list(_gaps([], 3)) == [(0, 3)]


SCRIPT = """
import sys, time
import jax, numpy as np, numpyro.distributions as dist
import sbi_flows as sf
from simulators import external_simulator

def slow(seed, theta):
    time.sleep(0.004)
    return theta + np.random.default_rng(seed).normal(size=2)

simulator = external_simulator(slow, shape=(2,), executor=sf.Processes(workers=2))
store = sf.SimulationStore(sys.argv[1], chunk=20)
prior = dist.Uniform(0.0, 1.0).expand([2])
store.simulate(jax.random.key(0), prior, simulator, 600, progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("times", [20])
def test_a_kill_loses_no_finished_chunk(tmp_path, times):
    """The process is killed at random moments, and restarted until all rows are finished."""
    (tmp_path / "run.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}

    def start(folder):
        return subprocess.Popen([sys.executable, tmp_path / "run.py", folder], env=environment)

    assert start(tmp_path / "alone").wait() == 0
    expected = sf.SimulationStore(tmp_path / "alone").simulations()
    rng, killed, rows = np.random.default_rng(0), 0, tmp_path / "s" / "rows"
    while killed < times:
        process = start(tmp_path / "s")
        before = len(list(rows.glob("0*")))
        # from its first chunk on: what comes before writes nothing
        while process.poll() is None and len(list(rows.glob("0*"))) <= before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.03))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        killed += 1
        kept = len(sf.SimulationStore(tmp_path / "s"))
        assert kept >= 20 * (before - 1)
    assert killed > 1
    assert start(tmp_path / "s").wait() == 0
    store = sf.SimulationStore(tmp_path / "s")
    store.verify()
    assert [c.start for c in store._sealed()] == list(range(0, 600, 20))
    same(expected, store.simulations())


def scaled(scale, key, theta):
    return scale * noisy(key, theta)["size"]


def test_a_partial_function_is_another_one_with_other_arguments(tmp_path):
    stored(tmp_path / "s", 5, functools.partial(scaled, 2.0))
    stored(tmp_path / "s", 8, functools.partial(scaled, 2.0))
    with pytest.raises(ValueError, match=r"simulator: expected that of .*scaled\(2.0\)"):
        stored(tmp_path / "s", 8, functools.partial(scaled, 3.0))


def test_a_store_is_written_by_one_process_at_a_time(tmp_path):
    import fcntl

    store, _ = stored(tmp_path / "s", 5)
    with open(tmp_path / "s" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(sf.StoreBusy, match="another process is simulating into it"):
            stored(tmp_path / "s", 8)
    assert len(store) == 5
