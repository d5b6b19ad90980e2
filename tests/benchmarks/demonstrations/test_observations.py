"""`python -m benchmarks observations` on a small case."""

import dataclasses
import json

import pytest

import sbi_flows as sf
from benchmarks.__main__ import main
from benchmarks.demonstrations import observations
from simulators.tasks import normal_set

SMALL = observations.Case(
    "normal_set",
    300,
    {
        "embedding": sf.DeepSet(width=8, layers=0, features=2),
        "missing": sf.RandomSubset(5, 100),
        "members": 1,
        "training": sf.Training(max_epochs=1),
    },
    {"5 trials": lambda i: normal_set.observation(i, trials=5)},
    {"5 trials": sf.RandomSubset(5, 5)},
)


@pytest.mark.slow
@pytest.mark.promotes
def test_cases_are_fitted_compared_and_checked(monkeypatch, tmp_path, capsys):
    for name, value in {"OBSERVATIONS": 1, "DRAWS": 60, "DATASETS": 60, "CHECK_DRAWS": 30}.items():
        monkeypatch.setattr(observations, name, value)
    other = dataclasses.replace(SMALL, simulations=310)
    monkeypatch.setattr(observations, "CASES", {"one": SMALL, "two": other})
    folder = ["--results", str(tmp_path)]
    assert main(["observations", "--cases", "one", *folder]) == 0
    first = json.loads((tmp_path / "observations.json").read_text())["cases"]
    assert main(["observations", "--cases", "two", *folder]) == 0
    both = json.loads((tmp_path / "observations.json").read_text())["cases"]
    assert both["one"] == first["one"] and both["two"]["simulations"] == 310
    assert 0.0 <= both["one"]["c2st"]["5 trials"]["mean"] <= 1.0
    assert len(both["one"]["checks"]["5 trials"]) == 2
    assert both["one"]["fit_seconds"] > 0.0
    capsys.readouterr()
    assert main(["observations", "--cases", "three", *folder]) == 2
    assert "expected names out of one, two; got three" in capsys.readouterr().err
