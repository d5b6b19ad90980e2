"""Records of runs are found again; spoilt ones are set aside; others are not overwritten."""

import json

import pytest

from benchmarks.suite.records import SCHEMA, BadInput
from benchmarks.suite.store import Run, Store

RUN = Run("slcp", "npe", 1000, 1)
RECORD = {"schema": SCHEMA, "c2st": {"mean": 0.5}}


def test_a_finished_run_is_found_as_it_was_written(tmp_path):
    kept = Store(tmp_path, {"draws": 10})
    assert kept.find(RUN, {}) is None
    written = kept.write(RUN, RECORD)
    assert kept.find(RUN, {}) == written
    assert (written["task"], written["seed"], written["kind"]) == ("slcp", 1, "run")
    assert kept.find(Run("slcp", "npe", 1000, 2), {}) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        json.dumps({"schema": SCHEMA}),
        json.dumps({**RECORD, "schema": SCHEMA - 1, "settings": {}, **vars(RUN)}),
        json.dumps({**RECORD, "settings": {}, **vars(RUN), "seed": 2}),
    ],
)
def test_what_is_no_record_of_the_run_is_named_and_set_aside(tmp_path, text, capsys):
    kept = Store(tmp_path, {})
    kept.path(RUN).write_text(text)
    assert kept.find(RUN, {}) is None
    assert "run-slcp-npe-1000-seed1.json: not a record of this run" in capsys.readouterr().err
    aside = tmp_path / "run-slcp-npe-1000-seed1.corrupt"
    assert aside.read_text() == text
    assert list(tmp_path.iterdir()) == [aside]


def test_runs_with_other_settings_are_not_overwritten(tmp_path):
    Store(tmp_path, {"draws": 10}).write(RUN, RECORD)
    for settings, name in (({"draws": 20}, "draws"), ({"draws": 10, "more": 1}, "more")):
        with pytest.raises(BadInput, match=f"made with another {name} .*choose another folder"):
            Store(tmp_path, settings).find(RUN, {})


def test_runs_of_another_estimator_are_not_taken_for_this_one(tmp_path):
    kept = Store(tmp_path, {})
    kept.write(RUN, {**RECORD, "estimator": {"members": 4}, "observed": "task"})
    assert kept.find(RUN, {"estimator": {"members": 4}, "observed": "task"}) is not None
    with pytest.raises(BadInput, match=r"another estimator \(\{'members': 4\}, now \{'memb.*5"):
        kept.find(RUN, {"estimator": {"members": 5}, "observed": "task"})
    with pytest.raises(BadInput, match=r"another observed \(task, now a1b2\)"):
        kept.find(RUN, {"observed": "a1b2"})
