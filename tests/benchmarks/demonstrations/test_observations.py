"""`python -m benchmarks observations` on a small case."""

import json

import pytest

import sbi_flows as sf
from benchmarks.__main__ import main
from benchmarks.demonstrations import observations
from benchmarks.suite.embedded import SETTINGS
from benchmarks.suite.report_observations import observations_table
from simulators.tasks import normal_set, sensors

QUICK = {
    "embedding": sf.DeepSet(width=8, layers=0, features=2),
    "missing": sf.RandomSubset(5, 100),
    "members": 1,
    "training": sf.Training(max_epochs=1),
}
SMALL = observations.Case(
    300,
    {"5 trials": lambda i: normal_set.observation(i, trials=5)},
    {"5 trials": sf.RandomSubset(5, 5)},
)


@pytest.mark.slow
@pytest.mark.promotes
def test_cases_are_fitted_compared_and_checked(monkeypatch, tmp_path, capsys):
    for name, value in {"OBSERVATIONS": 1, "DRAWS": 60, "DATASETS": 60, "CHECK_DRAWS": 30}.items():
        monkeypatch.setattr(observations, name, value)
    monkeypatch.setitem(SETTINGS, "normal_set", QUICK)
    monkeypatch.setitem(SETTINGS, "sensors", {**QUICK, "embedding": None, "missing": None})
    other = observations.Case(310, {"all": sensors.observation}, {"all": None})
    monkeypatch.setattr(observations, "CASES", {"normal_set": SMALL, "sensors": other})
    folder = ["--results", str(tmp_path)]
    assert main(["observations", "--cases", "normal_set", *folder]) == 0
    first = json.loads((tmp_path / "observations.json").read_text())["cases"]
    assert main(["observations", "--cases", "sensors", *folder]) == 0
    both = json.loads((tmp_path / "observations.json").read_text())["cases"]
    assert both["normal_set"] == first["normal_set"] and both["sensors"]["simulations"] == 310
    assert 0.0 <= both["normal_set"]["c2st"]["5 trials"]["mean"] <= 1.0
    assert len(both["normal_set"]["checks"]["5 trials"]) == 2
    assert both["normal_set"]["fit_seconds"] > 0.0
    ((_, rows),) = observations_table(tmp_path).values()
    assert [row[:3] for row in rows] == [
        ["normal_set", "5 trials", "300"],
        ["sensors", "all", "310"],
    ]
    capsys.readouterr()
    assert main(["observations", "--cases", "three", *folder]) == 2
    assert "expected names out of normal_set, sensors; got three" in capsys.readouterr().err
