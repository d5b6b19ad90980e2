"""JAX simulators on several devices: the same rows as on one, bit for bit."""

import json
import os
import subprocess
import sys

import jax
import pytest

from sbi_flows.simulations import batching

SIMULATE = """
import hashlib, json, sys
import jax, jax.numpy as jnp, numpy as np, numpyro.distributions as dist
import sbi_flows as sf
from sbi_flows.simulations import batching

prior = {"rate": dist.HalfNormal(1.0), "place": dist.Normal(0.0, 1.0).expand([2])}
mixing = jax.device_put(jax.random.normal(jax.random.key(9), (2, 30)), jax.devices()[0])

def path(key, theta):
    def step(state, key):
        state = state + 0.1 * (jnp.exp(-state) * theta["rate"] - state)
        state = state + 0.1 * jax.random.normal(key, (30,))
        return state, jnp.sum(state[:3])
    start = jnp.tanh(theta["place"] @ mixing)
    return jax.lax.scan(step, start, jax.random.split(key, 20))[1]

def until(key, theta):
    def more(state):
        return state[1] < theta["rate"] * 10.0
    def step(state):
        key, total, count = state
        key, own = jax.random.split(key)
        return key, total + jax.random.exponential(own), count + 1
    _, total, count = jax.lax.while_loop(more, step, (key, 0.0, 0))
    return {"total": total, "count": count, "draws": jax.random.poisson(key, total, (3,))}

def digest(sims):
    parts = [np.asarray(leaf[:]).tobytes() for leaf in jax.tree.leaves((sims.theta, sims.x))]
    return hashlib.sha256(b"".join(parts)).hexdigest()

found, key = {}, jax.random.key(0)
for n in (200, 1000, 2300):
    for simulator in (path, until):
        sims = sf.simulate(key, prior, simulator, n, progress=False)
        assert jax.tree.leaves(sims.x)[0].devices() == {jax.devices()[0]}
        found[f"{simulator.__name__} {n}"] = digest(sims)
whole = batching.MAX_CALL_ROWS
for chunk in (256, 512):
    batching.MAX_CALL_ROWS = chunk
    found[f"chunks of {chunk}"] = digest(sf.simulate(key, prior, path, 2300, progress=False))
batching.MAX_CALL_ROWS = whole
theta = sf.simulate(key, prior, path, 700, progress=False).theta
found["given"] = digest(sf.simulate_at(key, prior, path, theta, progress=False))
for chunk in (100, 1000):
    store = sf.SimulationStore(f"{sys.argv[1]}/{chunk}", chunk=chunk)
    found[f"store of {chunk}"] = digest(store.simulate(key, prior, path, 1500, progress=False))
mesh = batching.plan_calls(2048).mesh
print(json.dumps({
    "digests": found,
    "programs": [batching._on_one_device._cache_size(), batching._on_all_devices._cache_size()],
    "devices": 1 if mesh is None else mesh.size,
}))
"""


def simulated(folder, devices):
    """Run the script in a process with this many devices, and return its results."""
    # with the optimisation that users have: a difference in rounding shows only then
    flags = f"--xla_force_host_platform_device_count={devices}"
    run = subprocess.run(
        [sys.executable, "-c", SIMULATE, str(folder)],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_rows_are_the_same_bit_for_bit_on_eight_devices_and_on_one(tmp_path):
    one, eight = (simulated(tmp_path / str(devices), devices) for devices in (1, 8))
    assert (one["devices"], eight["devices"]) == (1, 8)
    assert eight["digests"] == one["digests"]
    digests = one["digests"]
    assert len(set(digests.values())) == 8
    assert digests["chunks of 256"] == digests["chunks of 512"] == digests["path 2300"]
    assert digests["store of 100"] == digests["store of 1000"]
    # on one device all is done by the program for one
    assert one["programs"][1] == 0 < eight["programs"][1]


def test_how_rows_are_spread_over_calls_and_devices(monkeypatch):
    one = [batching.plan_calls(n) for n in (5, 256, 257, 16_384, 100_000)]
    assert one == [(rows, None) for rows in (5, 256, 512, 16_384, 16_384)]
    assert [batching.plan_store_calls(n).rows for n in (5, 1000, 100_000)] == [256, 1024, 100_096]
    device = jax.devices()[0]
    monkeypatch.setattr(jax, "local_devices", lambda: [device] * 8)
    several = [batching.plan_calls(n) for n in (5, 300, 2048, 2300, 200_000)]
    sizes = [None if mesh is None else mesh.size for _, mesh in several]
    assert [rows for rows, _ in several] == [5, 512, 2048, 2560, 8 * 16_384]
    assert sizes == [None, 2, 8, 5, 8]
    assert [batching.plan_store_calls(n).rows for n in (5, 5000)] == [2048, 5376]
    with jax.default_device(device):
        assert batching.plan_calls(2048) == (2048, None)
