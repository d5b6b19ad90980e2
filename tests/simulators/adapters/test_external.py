"""External simulators in worker processes: results, failures, time and memory limits."""

import os
import signal
import sys
import time

import jax
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.core.errors import SimulationFailed
from sbi_flows.simulations.executors import Processes
from sbi_flows.simulations.processes import Limits, Process, pickle_job
from sbi_flows.simulations.worker import Job
from simulators import executable, external_simulator

pytestmark = pytest.mark.promotes

PRIOR = {"place": dist.Uniform(0.0, 1.0), "slope": dist.Normal(0.0, 1.0).expand([2])}
TWO = Processes(workers=2)


def line(seed, theta):
    noise = np.random.default_rng(seed).normal(size=3)
    return theta["place"] + theta["slope"].sum() * np.arange(3) + noise


def simulated(simulator, n=12, **settings):
    return sf.simulate(jax.random.key(0), PRIOR, simulator, n, progress=False, **settings)


def test_a_result_does_not_depend_on_where_it_was_made():
    simulator = external_simulator(line, shape=(3,))
    first = simulated(simulator, executor=Processes(workers=1))
    other = simulated(simulator, executor=TWO)
    np.testing.assert_array_equal(first.x, other.x)
    assert first.num_valid == 12
    # each row has noise of its own, and the parameters that stand beside it
    theta = np.asarray(first.theta)
    noise = np.asarray(first.x) - theta[:, :1] - theta[:, 1:].sum(1)[:, None] * np.arange(3)
    assert np.unique(noise.round(6)).size == 36
    # more rows begin with the same ones, if the parameters are the same
    few = sf.simulate_at(jax.random.key(1), PRIOR, simulator, theta[:4], progress=False)
    more = sf.simulate_at(jax.random.key(1), PRIOR, simulator, theta, progress=False)
    np.testing.assert_array_equal(few.x, more.x[:4])


def test_each_array_of_a_dict_has_its_dtype():
    @external_simulator(shape={"count": (), "curve": (2,)}, dtype={"count": int, "curve": float})
    def both(seed, theta):
        return {"count": 3, "curve": [theta["place"], 1]}

    sims = simulated(both)
    assert sims.x["count"].shape == (12,) and np.issubdtype(sims.x["count"].dtype, np.integer)
    np.testing.assert_array_equal(sims.x["curve"][:, 0], sims.theta[:, 0])


def hostile(seed, theta):
    """A simulator that fails in a way chosen by its parameter; 0 succeeds."""
    what = int(theta[0])
    print("a line on stdout", what)
    if what == 1:
        raise ArithmeticError("no such state")
    if what == 2:
        time.sleep(60)
    if what == 3:
        return np.zeros(5)
    if what == 4:
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == 5:
        os._exit(7)
    if what == 6:
        return np.ones(2**34, np.uint8)[:2].astype(float)
    if what == 7:
        return np.array([1.0, np.nan])
    if what == 8:
        os.write(2, b"the solver gave up\n")
        raise RuntimeError
    return theta + np.zeros(2)


def test_a_failed_simulation_gives_one_invalid_row_and_its_reason():
    simulator = external_simulator(hostile, shape=(2,), timeout=2.0, memory=1.0, executor=TWO)
    theta = np.zeros((40, 1), np.float32)
    theta[::5, 0] = np.arange(1, 9)
    prior = dist.Uniform(-1.0, 10.0).expand([1])
    with pytest.warns(sf.SbiFlowsWarning, match="8 of 40 simulations failed: ") as caught:
        sims = sf.simulate_at(jax.random.key(0), prior, simulator, theta, progress=False)
    np.testing.assert_array_equal(np.flatnonzero(~np.asarray(sims.valid)), np.arange(0, 40, 5))
    (message,) = {str(w.message) for w in caught if w.category is sf.SbiFlowsWarning}
    assert "1 its process was ended by SIGSEGV" in message
    reasons = {}
    process = Process(pickle_job(simulator.job))
    for what in range(1, 9):
        reasons[what] = process.run(0, np.full(1, what), simulator.limits).reason
    process.close()
    for what, expected in {
        1: "raised ArithmeticError: no such state (test_external.py, line",
        2: "was stopped after 2 s",
        3: "raised ValueError: expected numbers of shape (2,), got float64 of shape (5,)",
        4: "its process was ended by SIGSEGV",
        5: "its process ended with status 7",
        6: "ran out of memory",
        7: "",
        8: "it printed: a line on stdout 8\nthe solver gave up",
    }.items():
        assert expected in reasons[what]


def test_failed_simulations_are_repeated(tmp_path):
    def flaky(seed, theta):
        path = tmp_path / str(seed)
        if not path.exists():
            path.touch()
            os._exit(1)
        return theta["place"]

    settings = {"shape": (), "executor": TWO}
    assert simulated(external_simulator(flaky, retries=1, **settings)).num_valid == 12
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(SimulationFailed, match="all 12 simulations failed: 12 its process ended"):
        simulated(external_simulator(flaky, **settings))


def test_an_interrupt_leaves_no_process(tmp_path):
    def recorded(seed, theta):
        (tmp_path / str(os.getpid())).touch()
        return theta["place"]

    simulator = external_simulator(recorded, shape=(), executor=TWO)
    tasks = [(i, i, {"place": np.float32(0.5)}) for i in range(50)]
    rows = TWO.run(simulator.job, simulator.limits, tasks)
    assert next(rows)[1].x is not None
    rows.close()
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


def test_a_function_that_cannot_be_loaded_is_reported_at_once():
    class Bad:
        def __call__(self, seed, theta):
            return theta

        def __reduce__(self):
            return eval, ("1 / 0",)

    simulator = external_simulator(Bad(), shape=())
    with pytest.raises(SimulationFailed, match=r"process for it ended with (?s:.)*ZeroDivision"):
        simulated(simulator)
    with pytest.raises(ValueError, match="expected a function that can be sent to another process"):
        pickle_job(Job(sys.stderr.write, {"": ((), "<f8")}))


SCRIPT = """
import json, sys
given = json.load(open("given.json"))
print(given["place"], file=sys.stderr)
if given["place"] > 0.8:
    sys.exit(3)
print(given["place"], sys.argv[1])
"""


def test_an_executable_reads_its_parameters_and_prints_its_observation():
    program = executable(
        [sys.executable, "-c", SCRIPT, "{slope[1]}"],
        shape=(2,),
        files={"given.json": '{{"place": {place}, "seed": {seed}}}'},
        executor=TWO,
    )
    with pytest.warns(sf.SbiFlowsWarning, match="returned non-zero exit status 3"):
        sims = simulated(program, 20)
    theta, x = np.asarray(sims.theta), np.asarray(sims.x)
    np.testing.assert_array_equal(sims.valid, theta[:, 0] <= 0.8)
    np.testing.assert_allclose(x[sims.valid], theta[sims.valid][:, [0, 2]], rtol=1e-6)


def test_an_executable_with_a_reader():
    def read(folder):
        return {"size": len((folder / "stdout").read_bytes())}

    program = executable(["echo", "{theta[0]:.3f}"], shape={"size": ()}, dtype=int, read=read)
    assert program(jax.random.key(0), np.array([0.25])) == {"size": 6}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": 3}, "shape: expected a tuple of integers >= 0, got 3"),
        ({"shape": (2,), "dtype": str}, "dtype: expected a type of real numbers, got <U0"),
        ({"shape": {"a": ()}, "dtype": {"b": int}}, r"dtype: expected a type for each of \['a'\]"),
        ({"shape": (), "timeout": 0.0}, "timeout: expected a positive number"),
        ({"shape": (), "memory": -1.0}, "memory: expected a positive number"),
        ({"shape": (), "timeout": float("inf")}, "timeout: expected"),
        ({"shape": (), "retries": -1}, "retries: expected a whole number of at least 0, got -1"),
        ({"shape": (), "executor": 2}, "executor: expected an executor such as Processes"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        external_simulator(line, **settings)


def test_an_executor_is_for_external_simulators():
    with pytest.raises(ValueError, match="expected None with a simulator that is a JAX function"):
        simulated(lambda key, theta: theta["place"], executor=TWO)
    with pytest.raises(ValueError, match="arguments: expected a list of strings, got 'ls'"):
        executable("ls", shape=())


def test_memory_of_a_failed_simulation_is_freed_for_the_next(tmp_path):
    held = []

    def greedy(seed, theta):
        if seed == 1:
            while True:
                held.append(np.ones(2**24))
        return np.ones(2**25).sum() + theta

    simulator = external_simulator(greedy, shape=(), memory=0.5)
    process = Process(pickle_job(simulator.job))
    rows = [process.run(seed, 0.0, Limits()) for seed in (0, 1, 2, 3)]
    process.close()
    assert [row.reason for row in rows] == ["", "ran out of memory", "", ""]


def test_a_process_that_dies_is_noticed_although_its_child_lives():
    def forking(seed, theta):
        if os.fork() == 0:
            time.sleep(600)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    process = Process(pickle_job(external_simulator(forking, shape=()).job))
    row = process.run(0, 0.0, Limits())
    process.close()
    assert "was ended by SIGKILL" in row.reason


def test_numbers_that_a_type_does_not_hold_are_refused():
    simulator = external_simulator(lambda seed, theta: 40_000, shape=(), dtype=np.int16)
    with pytest.raises(SimulationFailed, match="expected numbers that <i2 holds, got int64 40000"):
        simulator(jax.random.key(0), 0.0)


def test_an_executable_may_be_named_by_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "model").write_text("#!/bin/sh\necho $1\n")
    (tmp_path / "model").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    program = executable(["./model", "{theta}"], shape=(1,))
    np.testing.assert_array_equal(program(jax.random.key(0), np.float64(2.5)), [2.5])
