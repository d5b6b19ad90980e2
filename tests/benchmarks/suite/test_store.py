"""Store of records: finished runs are found, unreadable files are renamed, others are kept."""

import json

import pytest

from benchmarks.suite.records import SCHEMA, BadInput
from benchmarks.suite.store import Run, Store

RUN = Run("slcp", "npe", 1000, 1)
RECORD = {"schema": SCHEMA, "c2st": {"mean": 0.5}}


def test_a_finished_run_is_found_as_it_was_written(tmp_path):
    store = Store(tmp_path, {"draws": 10})
    assert store.find(RUN, {}) is None
    written = store.write(RUN, RECORD)
    assert store.find(RUN, {}) == written
    assert (written["task"], written["seed"], written["kind"]) == ("slcp", 1, "run")
    assert store.find(Run("slcp", "npe", 1000, 2), {}) is None


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
def test_an_unreadable_file_is_reported_and_renamed(tmp_path, text, capsys):
    store = Store(tmp_path, {})
    store.path(RUN).write_text(text)
    assert store.find(RUN, {}) is None
    assert "run-slcp-npe-1000-seed1.json: not a record of this run" in capsys.readouterr().err
    renamed = tmp_path / "run-slcp-npe-1000-seed1.corrupt"
    assert renamed.read_text() == text
    assert list(tmp_path.iterdir()) == [renamed]


def test_runs_with_other_settings_are_not_overwritten(tmp_path):
    Store(tmp_path, {"draws": 10}).write(RUN, RECORD)
    for settings, name in (({"draws": 20}, "draws"), ({"draws": 10, "more": 1}, "more")):
        with pytest.raises(BadInput, match=f"made with another {name} .*choose another folder"):
            Store(tmp_path, settings).find(RUN, {})


def test_a_record_of_another_estimator_is_refused(tmp_path):
    store = Store(tmp_path, {})
    store.write(RUN, {**RECORD, "estimator": {"members": 4}, "observed": "task"})
    assert store.find(RUN, {"estimator": {"members": 4}, "observed": "task"}) is not None
    with pytest.raises(BadInput, match=r"another estimator \(\{'members': 4\}, now \{'memb.*5"):
        store.find(RUN, {"estimator": {"members": 5}, "observed": "task"})
    with pytest.raises(BadInput, match=r"another observed \(task, now a1b2\)"):
        store.find(RUN, {"observed": "a1b2"})
