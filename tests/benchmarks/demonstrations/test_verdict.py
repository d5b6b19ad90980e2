"""`python -m benchmarks verdict` on small cases, resumed, and its tables."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.demonstrations import verdict, verdict_cases
from benchmarks.suite.report_verdict import verdict_tables

OPTIMISM = [
    {
        "gain_held_out": gain,
        "gain_fresh_members": 1.0,
        "gain_fresh_mixture": 1.2,
        "width_held_out": 1.0,
        "width_fresh_members": 0.9,
        "width_fresh_mixture": 1.0,
    }
    for gain in (1.1, 1.3)
]
CURVE = {"rows": [200, 400], "predicted": [[0.1, 0.2, 0.3]], "measured": [0.25], "verdict": ""}


@pytest.mark.promotes
def test_the_record_is_resumed_and_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(verdict, "DATASETS", 500)
    monkeypatch.setattr(verdict, "DRAWS", 100)
    monkeypatch.setattr(verdict, "FEW", (50,))
    monkeypatch.setattr(verdict, "EXACT", {"gaussian 2": 2})
    name = "ignores one entry of ten"
    monkeypatch.setattr(verdict, "CASES", {name: verdict_cases.CASES[name]})
    monkeypatch.setattr(verdict, "CURVES", ("two_moons",))
    monkeypatch.setattr(verdict, "HELD_OUT", ("two_moons",))
    monkeypatch.setattr(verdict, "_optimism", lambda *_: OPTIMISM)
    monkeypatch.setattr(verdict, "_learning", lambda *_: CURVE)
    command = ["verdict", "--repeats", "2", "--fits", "2", "--results", str(tmp_path)]
    assert main(command) == 0
    path = tmp_path / "verdict.json"
    record = json.loads(path.read_text())
    assert record["exact"]["gaussian 2"]["checks"] == 2
    found = record["unused"][name]
    assert found["unused information"] == 1.0 and found["named"] == 1.0
    assert 0.5 * found["exact_nats"][0] < found["nats"] < 2.0 * found["exact_nats"][0]
    assert "calibrated" not in record["few"]["50"]["verdicts"]

    # an interrupted run goes on with the parts that are not in its record
    del record["learning"]
    record["exact"]["gaussian 2"]["checks"] = 99
    path.write_text(json.dumps(record))
    assert main(command) == 0
    resumed = json.loads(path.read_text())
    assert resumed["exact"]["gaussian 2"]["checks"] == 99 and "learning" in resumed
    assert main([*command[:2], "3", *command[3:]]) == 2
    assert "other settings" in capsys.readouterr().err

    unused, few, held_out, learning = (rows for _, rows in verdict_tables(tmp_path).values())
    assert [row[0] for row in unused] == ["gaussian 2, exact", name]
    assert few[0][:2] == ["50", "2"]
    assert held_out[0][-1] == "+0.200 +- 0.100" and held_out[1][-1] == "+0.100 +- 0.000"
    assert learning == [["two_moons", "200 to 400", "+0.200 (+0.100 to +0.300)", "+0.250"]]
