"""Several devices, and several processes: the same losses as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sbi_flows.training.devices import make_mesh

FIT = """
import json, os, sys
import jax
if "PROCESS" in os.environ:
    jax.distributed.initialize(os.environ["ADDRESS"], 2, int(os.environ["PROCESS"]))
import jax.numpy as jnp, numpy as np
import sbi_flows as sf
jax.config.update("jax_compilation_cache_dir", os.environ["CACHE"])
prior = sf.as_prior(sf_prior := __import__("numpyro").distributions.Uniform(-1, 1).expand([2]))
random = np.random.default_rng(0)
theta = random.uniform(-1, 1, (400, 2))
sims = sf.Simulations(theta, theta**2 + 0.1 * random.normal(size=(400, 2)))
density = sf.NSF(transforms=2, bins=4, hidden=(8, 8), context_width=8, context_blocks=1)
results = {}
for members in (1, 2):
    training = sf.Training(batch_size=64, max_epochs=3, devices=int(os.environ["DEVICES"]) or None)
    npe = sf.NPE(prior, density, training=training, members=members)
    posterior, history = npe.fit(jax.random.key(0), sims, progress=False)
    draws = posterior.sample(jax.random.key(1), sims.x[0], 3)
    results[members] = [history.train_loss.tolist(), history.validation_loss.tolist(),
                        np.asarray(draws).tolist()]
print(json.dumps({"devices": jax.device_count(), "results": results}))
"""


RESUMED = """
import json, os
import jax
if "PROCESS" in os.environ:
    jax.distributed.initialize(os.environ["ADDRESS"], 2, int(os.environ["PROCESS"]))
import numpy as np
from sbi_flows.training import ensemble
from tests.training.test_training import fit
jax.config.update("jax_compilation_cache_dir", os.environ["CACHE"])
devices = int(os.environ["DEVICES"]) or None
whole, epoch, calls = fit(), ensemble.Ensemble.epoch, []
def killed(self, key):
    calls.append(key)
    if len(calls) == 3:
        raise OSError("killed")
    return epoch(self, key)
ensemble.Ensemble.epoch = killed
kept = {"checkpoint": os.environ["KEPT"], "checkpoint_every": 1}
try:
    fit(devices=devices, **kept)
except OSError as error:
    assert str(error) == "killed"
resumed = fit(**kept)
assert len(calls) == 3 + 4, len(calls)
for (weights, history), same in ((resumed, devices is None), (fit(**kept), devices is None)):
    check = np.testing.assert_array_equal if same else np.testing.assert_allclose
    check(history.train_loss, whole[1].train_loss, **({} if same else {"rtol": 1e-3}))
    jax.tree.map(np.testing.assert_array_equal, weights, resumed[0])
    if same:
        jax.tree.map(np.testing.assert_array_equal, weights, whole[0])
print(json.dumps({"devices": jax.device_count(), "kept": os.listdir(os.environ["KEPT"])}))
"""


def _start(
    tmp_path: Path, devices: int, *, most: int = 0, code: str = FIT, **environment: str
) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    variables = {"XLA_FLAGS": flags, "CACHE": str(tmp_path / "cache"), "DEVICES": str(most)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=os.environ | variables | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finished(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return _finished(_start(tmp_path_factory.mktemp("one"), 1))["results"]


def _same(results: dict, alone: dict) -> None:
    for members, expected in alone.items():
        for ours, theirs in zip(results[members], expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(tmp_path, alone):
    found = _finished(_start(tmp_path, 8))
    assert found["devices"] == 8
    _same(found["results"], alone)


@pytest.mark.release
def test_a_fit_on_some_of_the_devices(tmp_path, alone):
    _same(_finished(_start(tmp_path, 8, most=2))["results"], alone)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path, alone):
    address = f"127.0.0.1:{20_000 + os.getpid() % 20_000}"
    processes = [_start(tmp_path / str(i), 1, ADDRESS=address, PROCESS=str(i)) for i in range(2)]
    for found in map(_finished, processes):
        assert found["devices"] == 2
        _same(found["results"], alone)


@pytest.mark.slow
@pytest.mark.parametrize("most", [0, 1])
def test_a_killed_fit_goes_on_with_eight_devices(tmp_path, most):
    """Of a fit on as many the same weights, bit for bit; of one on a single device, nearly."""
    found = _finished(_start(tmp_path, 8, most=most, code=RESUMED, KEPT=str(tmp_path / "kept")))
    assert found == {"devices": 8, "kept": ["fit.safetensors"]}


@pytest.mark.release
def test_a_killed_fit_goes_on_with_two_processes(tmp_path):
    """Whose folders are not the same: the first one keeps the state of both."""
    address = f"127.0.0.1:{20_000 + (os.getpid() + 1) % 20_000}"
    processes = []
    for i in range(2):
        variables = {"ADDRESS": address, "PROCESS": str(i), "KEPT": str(tmp_path / f"kept{i}")}
        processes.append(_start(tmp_path / str(i), 1, code=RESUMED, **variables))
    first, second = map(_finished, processes)
    assert (first["kept"], second["kept"]) == (["fit.safetensors"], [])


def test_one_device_needs_no_mesh():
    assert make_mesh(4, 64, None) is None
    with pytest.raises(
        ValueError, match="devices: expected at most 1, the number of devices, got 2"
    ):
        make_mesh(4, 64, 2)
