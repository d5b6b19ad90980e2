"""Tasks of installed packages: the example package, and entry points that are not tasks."""

import subprocess
import sys
from pathlib import Path

import pytest

import simulators

EXAMPLE = Path(__file__).parents[3] / "examples" / "ricker"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", folder, EXAMPLE]
    subprocess.run(command, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


def test_a_package_that_is_installed_offers_its_task(installed):
    assert "ricker" in simulators.list()
    assert "ricker" not in simulators.names()
    task = simulators.get("ricker")
    assert (task.name, task.dim) == ("ricker", 3)
    assert task.observation(1).shape == (50,)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"expected one of bernoulli_glm, .*, got 'logistic'"):
        simulators.get("logistic")


def test_an_entry_point_that_is_no_task_is_refused(tmp_path, monkeypatch):
    (tmp_path / "offers_nothing.py").write_text("thing = 3\n")
    folder = tmp_path / "offers_nothing-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: offers-nothing\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[sbi_flows.simulators]\nthing = offers_nothing:thing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="offers_nothing:thing: expected a Task, got int"):
        simulators.get("thing")
