"""The two real uses on few simulations: their figures and their record."""

import json

import pytest

from benchmarks.demonstrations import uses

pytestmark = [pytest.mark.release, pytest.mark.promotes]


def test_both_uses_write_their_figures_and_one_record(tmp_path, monkeypatch):
    influenza, schools = uses.influenza_use, uses.schools_use
    monkeypatch.setattr(uses, "DRAWS", 400)
    monkeypatch.setattr(uses, "PREDICTIONS", 50)
    monkeypatch.setattr(uses, "influenza_use", lambda folder: influenza(folder, 300, 60))
    monkeypatch.setattr(uses, "schools_use", lambda folder: schools(folder, 1_000, 60))
    uses.run(tmp_path)
    names = {"eight_schools.png", "influenza-corner.png", "influenza.png", "uses.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    record = json.loads((tmp_path / "uses.json").read_text())
    assert record["kind"] == "uses"
    assert record["influenza"]["simulations"] == {"total": 300, "valid": 300}
    assert set(record["influenza"]["quantiles"]) == {"r0", "before", "in_bed", "first"}
    assert record["influenza"]["days"] == 14
    assert 0 <= record["influenza"]["days_inside"] <= 14
    assert uses.costs(record)[2].startswith("| `influenza` | 300 |")
    assert [line.split("`")[1] for line in uses.quantiles(record["influenza"])[2:]] == [
        "r0",
        "before",
        "in_bed",
        "first",
    ]
    # a thousand simulations give a posterior close to that of NUTS
    assert 0.4 < record["eight_schools"]["c2st"] < 0.75
    for use in ("influenza", "eight_schools"):
        assert {"simulate", "fit", "draw", "check"} <= set(record[use]["seconds"])
        for low, middle, high in record[use]["quantiles"].values():
            assert low < middle < high
