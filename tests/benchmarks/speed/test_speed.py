"""Speed measurements on small problems: results, tables and options of the processes."""

import json
import subprocess

import numpy as np
import pytest

import sbi_flows as sf
from benchmarks.peers import flowjax_flow
from benchmarks.peers.contestant import Recipe
from benchmarks.speed import accelerator, growth, profile, speed


@pytest.mark.release
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
    monkeypatch.setenv("OTHER", "1")
    found = speed.cold_process(budget=123)
    assert found["budget"] == 123
    assert "JAX_COMPILATION_CACHE_DIR" not in seen["env"] and seen["env"]["OTHER"] == "1"
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


@pytest.mark.release
def test_growth_has_times_and_an_exponent(monkeypatch):
    monkeypatch.setattr(growth, "BASE", growth.BASE | {"dim": 2, "features": 2, "batch": 32})
    grown = growth.growth("rows", (64, 4_096), repeats=2)
    assert grown["sizes"] == [64, 4_096]
    assert len(grown["seconds"]) == 2 and min(grown["seconds"]) > 0
    expected = np.log(grown["seconds"][1] / grown["seconds"][0]) / np.log(64)
    assert grown["exponent"] == pytest.approx(expected)


@pytest.mark.release
def test_the_parts_of_the_accelerator_record(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(accelerator, "BATCHES", (64, 128, 256))
    monkeypatch.setattr(accelerator, "MEMBERS", (1, 2))
    monkeypatch.setattr(accelerator, "PRECISIONS", ("highest",))
    monkeypatch.setattr(accelerator, "WIDE", sf.NSF(transforms=1, hidden=(8,), context_width=8))
    monkeypatch.setattr(accelerator, "WIDE_BATCH", 128)
    accelerator.run(tmp_path, rows=2_000)
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert set(found["batches"]) == {"64", "128", "256"} and set(found["members"]) == {"1", "2"}
    one, two = found["members"].values()
    assert two["rows_per_second"] == pytest.approx(128 * two["steps_per_second"])
    assert one["rows_per_second"] == pytest.approx(64 * one["steps_per_second"])
    assert found["precision"]["highest"]["step_us"] > 0
    # below the loss of the linear start, the entropy of the residual noise
    assert found["precision"]["highest"]["loss"] < 4 * 1.42
    assert found["limits"]["launch_us"] > 0
    assert "kernels per step" in capsys.readouterr().out


def test_growth_is_a_row_an_axis():
    found = {"sizes": [10, 1_000], "seconds": [0.5, 50.0], "exponent": 1.0}
    last = growth.text({"rows": found}).splitlines()[-1]
    assert last.split() == ["rows", "10", "1,000", "0.5", "50", "1.00"]


def test_the_large_fit_reads_the_output_of_its_process(monkeypatch):
    def run(command, **options):
        compile(command[-1], "large", "exec")
        return subprocess.CompletedProcess(command, 0, "0.5 1.0 2.0\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert speed.large_fit(budget=77) == {
        "budget": 77,
        "data_gib": 0.5,
        "before_gib": 1.0,
        "peak_gib": 2.0,
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dot.158", "products and sums"),
        ("ynn_fusion.3", "products and sums"),
        ("sort.1", "sorts of the data's order"),
        ("bitcast_dynamic-update-slice_fusion.4", "copies and slices"),
        ("wrapped_copy.4", "copies and slices"),
        ("multiply_add_fusion.2", "elementwise"),
        ("while.3", None),
        ("ThunkExecutor::Execute", None),
        ("PjitFunction(epoch)", None),
    ],
)
def test_kernels_are_recognised_by_their_names(name, kind):
    assert profile._kind(name) == kind


@pytest.mark.release
def test_a_step_is_profiled():
    sizes = growth.BASE | {"rows": 1_000, "dim": 2, "features": 2, "batch": 32}
    found = profile.step_profile(sizes=sizes, repeats=1)
    assert found["operations"] == 6 * 32 * found["parameters"]
    assert found["kernels"] > 10 and found["kernel_us"]["products and sums"] > 0
    assert found["floor_us"] == pytest.approx(1e6 * found["operations"] / found["rate"])
    assert found["step_us"] > 0
    assert f"{found['kernels']:.0f} kernels per step" in profile.text(found)
