"""`python -m benchmarks run` on small problems: bad input, records, tables."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sbi_flows as sf
import simulators
from benchmarks.__main__ import main
from benchmarks.suite import description, methods, runner
from benchmarks.suite.settings import Settings
from sbi_flows.core.compilation import drop_old_programs
from sbi_flows.estimators.stacking import StackHistory

ROOT = Path(__file__).parents[3]
TINY = ["--draws", "40", "--datasets", "50", "--check-draws", "20", "--observations", "2"]
QUICK = ["--tasks", "two_moons", "--methods", "npe-mixture", "--budgets", "60", *TINY]
NUMBER = (int, float)
PHASES = (
    "simulate",
    "fit",
    "draw",
    "draw again",
    "held-out",
    "reference",
    "c2st",
    "check",
    "predictive",
)

# type of each field of a record; a tuple lists alternatives
SCHEMA = {
    "schema": int,
    "kind": str,
    "task": str,
    "method": str,
    "budget": int,
    "seed": int,
    "valid": int,
    "time": str,
    "revision": (str, type(None)),
    "machine": {
        "cores": (int, type(None)),
        "architecture": str,
        "memory_gib": (int, type(None)),
        "device": str,
    },
    "versions": dict,
    "settings": {
        "observations": int,
        "observations_from": str,
        "draws": int,
        "datasets": int,
        "check_draws": int,
        "held_out": int,
    },
    "estimator": {
        "method": str,
        "density": str,
        "training": str,
        "members": int,
        "emulator": type(None),
        "screening": type(None),
    },
    "c2st": {"mean": float, "values": list},
    "mmd": {"mean": float, "values": list},
    "normalisation": float,
    "peak_memory_gib": NUMBER,
    "outside_support": NUMBER,
    "held_out_loss": float,
    "check": dict,
    "predictive": list,
    "history": {
        "epochs": int,
        "stop_reason": str,
        "best_epoch": list,
        "best_loss": list,
        "held_out_loss": float,
        "seconds": float,
        "emulator": type(None),
        "kept": type(None),
    },
    "seconds": dict.fromkeys((*PHASES, "total"), NUMBER),
    "import_seconds": NUMBER,
    "jobs": int,
    "compile_seconds": dict.fromkeys(PHASES, NUMBER),
}


def unlike(value, schema, name="record"):
    """List the fields of a value that differ from the schema."""
    if not isinstance(schema, dict):
        return [] if isinstance(value, schema) else [f"{name}: {value!r}"]
    if value.keys() != schema.keys():
        return [f"{name}: {sorted(value.keys() ^ schema.keys())}"]
    return [field for k, s in schema.items() for field in unlike(value[k], s, f"{name}.{k}")]


def quick(task):
    density = sf.NSF(transforms=1, bins=2, hidden=(8,), context_width=0, dropout=0.0)
    return sf.NPE(task.prior, density, training=sf.Training(max_epochs=1), members=1)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setitem(methods.METHODS, methods.DEFAULT, quick)
    runner._estimator.cache_clear()
    # after fits to many sizes in this process, the first fit would drop programs
    drop_old_programs((60, 60))
    yield
    runner._estimator.cache_clear()


@pytest.mark.promotes
@pytest.mark.slow
def test_a_run_writes_one_line_a_seed_and_prints_a_table(few, tmp_path, capsys):
    options = ["--tasks", "two_moons", "--budgets", "60", "--seeds", "2", *TINY]
    assert main(["run", *options, "--results", str(tmp_path / "results")]) == 0
    records = [json.loads(p.read_text()) for p in sorted((tmp_path / "results").glob("*.json"))]
    assert [(r["task"], r["budget"], r["seed"]) for r in records] == [
        ("two_moons", 60, 1),
        ("two_moons", 60, 2),
    ]
    for record in records:
        assert unlike(record, SCHEMA) == []
        assert record["outside_support"] == 0.0
        assert record["valid"] == 60
        assert len(record["c2st"]["values"]) == 2
        assert record["c2st"]["mean"] == pytest.approx(np.mean(record["c2st"]["values"]))
        assert record["check"]["num_datasets"] == 50
        assert [set(p) for p in record["predictive"]] == [{"distance_p", "worst_p"}] * 2
        assert all(0 < p <= 1 for check in record["predictive"] for p in check.values())
        assert record["seconds"]["total"] >= record["seconds"]["fit"] > 0
    # the second seed finds everything compiled
    assert records[0]["compile_seconds"]["fit"] > 0.0 == records[1]["compile_seconds"]["fit"]
    assert records[0]["held_out_loss"] != records[1]["held_out_loss"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:2] == ["C2ST", "worst"]
    assert printed[1].startswith("two_moons stack 60 seed 1")
    assert f"{records[0]['c2st']['mean']:.3f}" in printed[1]
    # a finished run is not repeated; a run with an unreadable file is
    unreadable, finished = sorted((tmp_path / "results").glob("*.json"))
    before = finished.stat().st_mtime_ns
    unreadable.write_text(unreadable.read_text()[:100])
    assert main(["run", *options, "--results", str(tmp_path / "results")]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == printed[0]
    assert len(out.splitlines()) == len(printed)
    assert "1 runs are already finished" in err
    assert f"{unreadable.name}: not a record of this run; renamed to" in err
    assert finished.stat().st_mtime_ns == before
    again = json.loads(unreadable.read_text())
    assert again["c2st"] == records[0]["c2st"]
    refused(
        ["run", *options, "--draws", "50", "--results", str(tmp_path / "results")],
        r"--results: .*seed1.json was made with another draws \(40, now 50\)",
        capsys,
    )


@pytest.mark.release
@pytest.mark.promotes
def test_two_jobs_write_the_records_of_one(tmp_path):
    options = [*QUICK, "--seeds", "2"]
    found = []
    for jobs in ("1", "2"):
        folder = tmp_path / jobs
        assert main(["run", *options, "--jobs", jobs, "--results", str(folder)]) == 0
        found.append({p.name: json.loads(p.read_text()) for p in folder.glob("*.json")})
    assert len(found[0]) == 2
    assert found[0].keys() == found[1].keys()
    for name, record in found[0].items():
        for same in ("c2st", "held_out_loss", "check", "settings", "estimator"):
            assert record[same] == found[1][name][same]


@pytest.mark.slow
def test_a_killed_benchmark_loses_only_the_current_run(tmp_path):
    options = [*QUICK, "--seeds", "3", "--results", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks", "run", *options]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob("*.json")) and process.poll() is None:
            time.sleep(0.05)
        process.kill()
    finished = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.glob("*.json")}
    assert 1 <= len(finished) <= 2
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"{len(finished)} runs are already finished" in run.stderr
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in finished} == finished
    records = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("*.json"))]
    assert [r["seed"] for r in records] == [1, 2, 3]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json"] * 3


def test_a_stack_is_described_part_by_part():
    stack = methods.get("stack")(simulators.two_moons())
    parts = description.describe(stack)["estimators"]
    assert [part["density"].split("(")[0] for part in parts] == ["NSF", "NSF", "MAF"]
    assert [part["emulator"] is None for part in parts] == [False, True, True]
    pairs = np.zeros((4, 2))
    history = sf.History(
        *(np.zeros((1, 4)),) * 2, np.zeros(4), pairs, pairs, np.zeros(4), 1, 1.0, "x"
    )
    stack_history = StackHistory(
        (history, None), np.array([1.0, 0.0]), np.array([0.5, np.inf]), 0.5
    )
    record = description.history_record(stack_history)
    assert record["parts"][0].keys() == description.history_record(history).keys()
    assert record["parts"][1] is None
    assert record["mixture_loss"] == 0.5


OWN = """
import jax
import numpyro.distributions as dist
from simulators import Task

def simulator(key, theta):
    return SIMULATED

def task():
    return Task(name="mine", prior=dist.Normal(0.0, 1.0), simulator=simulator, citation="")
"""


@pytest.mark.release
@pytest.mark.promotes
def test_a_user_task_is_scored_without_a_reference(few, tmp_path, monkeypatch, capsys):
    (tmp_path / "own_model.py").write_text(
        OWN.replace("SIMULATED", "theta + jax.random.normal(key)")
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--simulator", "own_model:task", "--budgets", "60", *TINY]
    assert main(["run", *options, "--results", str(tmp_path)]) == 0
    (record,) = [json.loads(p.read_text()) for p in tmp_path.glob("*.json")]
    assert (record["task"], record["c2st"]) == ("mine", {"mean": None, "values": []})
    assert record["check"]["num_datasets"] == 50
    assert record["normalisation"] == pytest.approx(1.0, abs=0.05)
    assert capsys.readouterr().out.splitlines()[1].split()[5:7] == ["-", "-"]


def test_an_entry_point_names_a_simulator(tmp_path, monkeypatch):
    (tmp_path / "offered_model.py").write_text(OWN.replace("SIMULATED", "theta"))
    folder = tmp_path / "offered-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[sbi_flows.simulators]\nmodel = offered_model:task\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert Settings(simulator="model").names == ("mine",)


@pytest.mark.parametrize(
    ("simulated", "message"),
    [
        ("theta * float('nan')", "bad_model: .*all 60 simulations failed: 60 gave NaN"),
        ("{}", "bad_model: .*expected numeric arrays"),
        ("theta if theta > 0 else -theta", "bad_model: .*TracerBoolConversionError"),
        ("1 + 'a'", "bad_model: .*unsupported operand"),
    ],
)
def test_a_simulator_that_cannot_be_run_is_refused(
    few, tmp_path, monkeypatch, capsys, simulated, message
):
    name = f"bad_model_{abs(hash(simulated))}"
    text = OWN.replace("SIMULATED", simulated).replace('"mine"', '"bad_model"')
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--simulator", f"{name}:task", "--budgets", "60", *TINY]
    refused(["run", *options, "--results", str(tmp_path)], message, capsys)
    assert not list(tmp_path.glob("*.json"))


def test_the_table_shows_each_figure_in_its_column():
    seconds = {"simulate": 1.0, "fit": 2.0, "draw": 3.0, "check": 4.0, "total": 10.0}
    record = {
        "task": "slcp",
        "method": "npe",
        "budget": 1000,
        "seed": 1,
        "c2st": {"mean": None, "values": []},
        "outside_support": 0.25,
        "held_out_loss": -1.5,
        "check": {"calibrated": True},
        "seconds": seconds,
    }
    row = runner.results_table([record]).splitlines()[1].split()
    assert row == "slcp npe 1,000 seed 1 - - -1.500 25.00% yes 1.0 2.0 3.0 4.0 10.0".split()


def test_a_schema_violation_is_found():
    record = {"schema": "1"}
    assert unlike(record, {"schema": int}) == ["record.schema: '1'"]
    assert unlike({"a": {}}, {"a": {"b": int}}) == ["record.a: ['b']"]


def test_given_observations_replace_the_tasks_own(few, tmp_path):
    x = np.array([0.5, -0.25], np.float32)
    np.savez(tmp_path / "two_moons.npz", x_1=x, x_2=x + 1, theta_1=x)
    settings = Settings(
        tasks=("two_moons",), budgets=(60,), observations=2, observations_from=tmp_path
    )
    found = runner.observations_of(settings.task("two_moons"), settings)
    np.testing.assert_array_equal(np.stack(found), [x, x + 1])
    assert settings.record()["observations_from"] == "given"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, r"cannot read .*two_moons.npz: No such file"),
        ({"x_1": np.zeros(2)}, r"two_moons.npz: expected an array x_2"),
        ({"x_1": np.zeros(2), "x_2": np.zeros(3)}, r"expected x_2 of shape \(2,\), got \(3,\)"),
    ],
)
def test_bad_observations_are_refused(tmp_path, capsys, arrays, message):
    if arrays is not None:
        np.savez(tmp_path / "two_moons.npz", **arrays)
    options = ["--tasks", "two_moons", "--observations", "2", "--observations-from", str(tmp_path)]
    refused(["run", *options, "--results", str(tmp_path)], message, capsys)
    assert not list(tmp_path.glob("*.json"))


def test_a_file_that_is_no_archive_is_refused(tmp_path, capsys):
    (tmp_path / "two_moons.npz").write_text("not an archive")
    options = ["--tasks", "two_moons", "--observations-from", str(tmp_path)]
    refused(
        ["run", *options, "--results", str(tmp_path)], "two_moons.npz: not an .npz file", capsys
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "three_moons"], r"--tasks: expected names out of bernoulli_glm, .*three_m"),
        (
            ["--tasks", "slcp", "--methods", "magic"],
            "--methods: expected names out of stack, .*magic",
        ),
        (["--tasks", "slcp", "--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (["--tasks", "slcp", "--budgets", "0"], "--budgets: expected at least 10 .* got 0"),
        (["--tasks", "slcp", "--budgets", "many"], "argument --budgets: invalid int value: 'many'"),
        (["--tasks", "slcp", "--seeds", "-1"], "--seeds: expected at least 1, got -1"),
        (["--tasks", "slcp", "--observations", "0"], "--observations: expected at least 1, got 0"),
        (["--tasks", "slcp", "--draws", "3"], "--draws: expected at least 10, got 3"),
        (["--tasks", "slcp", "--check-draws", "1"], "--check-draws: expected at least 20, got 1"),
        (["--tasks"], "argument --tasks: expected at least one argument"),
        ([], "--tasks: expected at least one name, or a --simulator"),
        (["--simulator", "nothing"], r"expected package.module:name, or .* installed\), got 'no"),
        (["--simulator", "nothing:"], "expected package.module:name, or .*, got 'nothing:'"),
        (["--simulator", "no.such:task"], "--simulator: cannot import no.such:task: ModuleNot"),
        (["--simulator", "simulators:nope"], "--simulator: cannot import simulators:nope: Attr"),
        (["--simulator", "simulators:names"], "expected a simulators.Task at .* got tuple"),
        (["--simulator", "simulators:slcp"], "the name 'slcp' is that of a benchmark task"),
    ],
)
def test_bad_options_are_refused(tmp_path, capsys, options, message):
    refused(["run", *options, "--results", str(tmp_path)], message, capsys)


@pytest.mark.parametrize(
    "command",
    [["run", "--tasks", "slcp", "--results"], ["demo", "--folder"], ["speed", "--results"]],
)
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys, command):
    (tmp_path / "file").touch()
    refused([*command, str(tmp_path / "file" / "x")], "cannot write to .*file/x", capsys)


def test_no_command_is_refused(capsys):
    refused([], "the following arguments are required: COMMAND", capsys)


def refused(argv, message, capsys):
    """Assert exit status 2 and one line on stderr that matches the message."""
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2
    assert sum("error: " in line for line in err.splitlines()) == 1, err
    assert re.search(message, err), err
