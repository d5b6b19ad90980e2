"""Records: provenance without names, atomic writing, and the clock."""

import getpass
import json
import os
import platform

import numpy as np
import pytest

from benchmarks.suite import records


def test_provenance_describes_the_machine_without_naming_it():
    found = records.provenance()
    assert found["schema"] == records.SCHEMA
    assert found["machine"]["architecture"] == platform.machine()
    assert found["machine"]["cores"] >= 1
    assert found["versions"]["jax"].count(".") >= 2
    text = json.dumps(found)
    named = [platform.node(), os.getcwd(), os.path.expanduser("~")]
    assert [name for name in named if len(name) > 3 and name in text] == []
    assert f"/{getpass.getuser()}" not in text


def test_a_record_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    records.write_json(path, {"x": 1})
    records.write_json(path, {"x": np.float32(2.0), "y": [np.inf, np.arange(2)]})
    assert json.loads(path.read_text()) == {"x": 2.0, "y": [None, [0, 1]]}
    assert path.read_text().count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = records.write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        records.write_json(path, {"x": object()})
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_made_or_refused(tmp_path):
    assert records.writable_folder(tmp_path / "a" / "b", "--results").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(records.BadInput, match=r"--results: cannot write to .*file/b: Not a dir"):
        records.writable_folder(tmp_path / "file" / "b", "--results")


def test_the_clock_adds_its_phases():
    lines = []
    clock = records.Clock(log=lines.append)
    for phase in ("one", "two"):
        with clock(phase):
            pass
    assert list(clock.seconds) == ["one", "two"]
    assert clock.total == sum(clock.seconds.values())
    assert [line.split(":")[0] for line in lines] == ["one", "two"]
