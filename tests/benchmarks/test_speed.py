"""The speed measurements, tiny: they measure the same work on both sides and say what it was."""

import subprocess

import numpy as np
import pytest

from benchmarks import speed
from benchmarks.peers import flowjax_flow
from benchmarks.peers.contestant import Recipe


@pytest.mark.slow
@pytest.mark.promotes
def test_training_speed_without_the_peer(monkeypatch):
    monkeypatch.setattr(flowjax_flow.importlib.util, "find_spec", lambda name: None)
    for name, size in {"TRANSFORMS": 1, "HIDDEN": (8, 8), "BINS": 2}.items():
        monkeypatch.setattr(speed, name, size)
    found = speed.training_speed(simulations=450, epochs=1, repeats=2)
    assert found["steps"] == 2
    assert set(found["steps_per_second"]) == {"ours", "ours, defaults"}
    assert all(len(v) == 2 and min(v) > 0 for v in found["steps_per_second"].values())
    assert found["ratio"] is None
    assert "pip install" in speed._training_text(found)


def test_a_ratio_is_printed_where_the_peer_is_there():
    found = {"median": {"ours": 300.0, "flowjax": 100.0}, "ratio": 3.0}
    assert speed._training_text(found).splitlines()[-1] == "ours / flowjax: 3.00"


def test_the_cold_process_starts_without_a_compilation_cache(monkeypatch):
    seen = {}

    def run(command, **options):
        seen.update(options, command=command)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "cache")
    monkeypatch.setenv("KEPT", "1")
    found = speed.cold_process(budget=123)
    assert found["budget"] == 123
    assert "JAX_COMPILATION_CACHE_DIR" not in seen["env"] and seen["env"]["KEPT"] == "1"
    assert "task.simulator, 123," in seen["command"][-1]
    compile(seen["command"][-1], "cold", "exec")


@pytest.mark.promotes
def test_the_peer_fits():
    pytest.importorskip("flowjax")
    rng = np.random.default_rng(0)
    fit = flowjax_flow.flowjax_peer(
        rng.normal(size=(40, 2)),
        rng.normal(size=(40, 3)),
        Recipe(transforms=1, hidden=(4, 4), bins=3, batch=10, learning_rate=1e-3),
        epochs=1,
    )
    assert fit() > 0
