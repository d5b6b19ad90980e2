"""Rules for all source files: safe loading, no network, short files; and figures of the pages."""

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.demonstrations import choosing, continuous, rounds, uses
from benchmarks.peers import report as peers_report
from benchmarks.peers.compare import OURS
from benchmarks.speed import accelerator, batches, growth, profile
from benchmarks.suite import report

ROOT = Path(__file__).parents[1]
SHIPPED = ("sbi_flows", "simulators")
FOLDERS = (*SHIPPED, "benchmarks", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MAX_LINES = 400

RUNS_CODE = {"dill", "joblib", "marshal", "shelve"}  # and any module with "pickle" in its name
# the first file sends the user's simulator over a pipe to its child process, the second one
LOADING = ("dumps(", "loads(", "load(", "dump(", "Unpickler")
PICKLES = "tests/posteriors/test_pickling.py"
SENDS, LOADS = "sbi_flows/simulations/processes.py", "sbi_flows/simulations/worker.py"
NETWORK = {"aiohttp", "ftplib", "http", "httpx", "requests", "smtplib", "socket", "urllib"}
# name of the import -> name of the distribution, where they differ
DISTRIBUTIONS = {"dask": "distributed", "lazy_loader": "lazy-loader", "sklearn": "scikit-learn"}
MACHINE_PATH = re.compile(r"(?<![\w.$}])/(?:home|root|Users|work|mnt)/\w")


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def unsafe(source: str) -> list[str]:
    """Return imports and arguments by which loading data could run code, and network clients."""
    tree = ast.parse(source)
    tops = {name.split(".")[0] for name in imported(tree)}
    found = sorted(t for t in tops if "pickle" in t or t in RUNS_CODE | NETWORK)
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append("allow_pickle")
    return found


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = project["dependencies"] + project["optional-dependencies"]["distributed"]
    return {re.split(r"[^\w-]", need)[0].lower() for need in needs}


def test_the_tree_is_there():
    assert Path(__file__) in SOURCES
    assert any(path.is_relative_to(ROOT / "sbi_flows") for path in SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_source_file(path):
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_LINES, "split the file"
    name, cloud = str(path.relative_to(ROOT)), "cloud" + "pickle"
    # users may pickle the library's objects for their own process pools; its files never are
    allowed = {SENDS: [cloud], LOADS: [cloud], PICKLES: [cloud, "pickle"]}.get(name, [])
    assert unsafe(source) == allowed


def test_only_the_simulator_of_a_child_process_is_unpickled():
    calls = [(path, "cloud" + "pickle." + name) for path in (SENDS, LOADS) for name in LOADING]
    found = {call: (ROOT / call[0]).read_text().count(call[1]) for call in calls}
    expected = {(SENDS, "dumps("): 1, (LOADS, "loads("): 1}
    assert {(path, name.split(".")[1]): n for (path, name), n in found.items() if n} == expected


@pytest.mark.parametrize(
    "source",
    [
        *(f"import {name}" for name in ("pickle", "joblib", "urllib.request", "cloud" + "pickle")),
        "from http import client",
        "import numpy as np\nnp.load('a.npz', allow_pickle=not False)",
    ],
)
def test_an_unsafe_source_is_found(source):
    assert len(unsafe(source)) == 1


def test_no_path_of_one_machine():
    texts = [p for pattern in ("*.md", "*.toml", "*.cff", "*.yaml") for p in ROOT.glob(pattern)]
    texts += [ROOT / "Makefile", ROOT / ".ci" / "run", *SOURCES]
    found = [str(p.relative_to(ROOT)) for p in texts if MACHINE_PATH.search(p.read_text())]
    assert found == []
    assert MACHINE_PATH.search("see " + "/".join(["", "home", "someone"]))


@pytest.mark.newest
def test_every_import_is_a_declared_dependency():
    shipped = [p for p in SOURCES if p.relative_to(ROOT).parts[0] in SHIPPED]
    tops = {n.split(".")[0] for p in shipped for n in imported(ast.parse(p.read_text()))}
    third_party = tops - sys.stdlib_module_names - set(SHIPPED)
    assert "jax" in third_party
    assert {DISTRIBUTIONS.get(name, name) for name in third_party} <= declared()


def test_citation_and_project_agree_on_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


RESULTS = ROOT / "benchmarks" / "results"


def result_files(kind: str) -> list[dict]:
    files = sorted(RESULTS.glob("*.json"))
    records = [json.loads(file.read_text()) for file in files]
    return [record for record in records if record["kind"] == kind]


def runs() -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob("runs/run-*.json"))]


def test_the_table_of_the_readme_is_that_of_the_runs():
    columns, rows = report.summary(report.cells_of([r for r in runs() if r["method"] == "stack"]))
    assert len(rows) == 10
    table = [f"| {' | '.join([task, *rest])} |" for task, _, *rest in [columns, *rows]]
    lines = (ROOT / "README.md").read_text().splitlines()
    assert [line for line in table if line not in lines] == []


def test_the_tables_of_the_ablations_are_those_of_the_runs():
    several = {r["task"] for r in runs() if r["method"] != "stack"}
    chosen = [r for r in runs() if r["budget"] == 10_000]
    side_by_side = report.methods_table(
        report.cells_of([r for r in chosen if r["task"] in several])
    )
    parts = report.parts_table(report.cells_of(chosen))
    assert len(side_by_side[1]) >= 3 and len(parts[1]) == 10
    lines = (ROOT / "docs" / "ablations.md").read_text().splitlines()
    for columns, rows in (side_by_side, parts):
        assert [r for r in [columns, *rows] if f"| {' | '.join(r)} |" not in lines] == []


def test_the_figures_of_the_page_on_performance_are_those_of_the_result_files():
    lines = (ROOT / "docs" / "performance.md").read_text().splitlines()
    (speed,), (peers,) = result_files("speed"), result_files("peers")
    tables = [
        peers_report.markdown(result, [name for name in OURS if name in result["contestants"]])
        for result in peers["tasks"].values()
    ]
    tables += [profile.markdown(speed["step"]), growth.markdown(speed["growth"])]
    (gpu,) = result_files("accelerator")
    tables += [accelerator.markdown(gpu["batches"], "batch size")]
    tables += [accelerator.markdown(gpu["members"], "members")]
    (rows,) = result_files("batches")
    tables += [batches.markdown(rows["batches"])]
    assert len(tables) == 7
    for table in tables:
        assert [line for line in table if line not in lines] == []
    said = "\n".join(lines)
    assert f"{speed['step']['step_us']:.0f} microseconds" in said
    assert f"{speed['step']['floor_us']:.0f} microseconds" in said
    assert f"{speed['large']['peak_gib']:.2f} GiB" in said
    assert f"{gpu['limits']['launch_us']:.2f} microseconds" in said
    for rate in gpu["limits"]["rate"].values():
        assert f"{rate / 1e12:.0f} TFLOP/s" in said


def test_the_table_of_the_page_on_choosing_is_that_of_the_runs():
    files = sorted(RESULTS.glob("continuous/run-*.json"))
    table = choosing.choosing_table([json.loads(file.read_text()) for file in files])
    assert len(table) > 2
    lines = (ROOT / "docs" / "choosing.md").read_text().splitlines()
    assert [line for line in table if line not in lines] == []


def test_the_page_on_the_uses_is_that_of_the_result_file():
    (record,) = result_files("uses")
    said = (ROOT / "docs" / "uses.md").read_text()
    tables = [uses.costs(record), uses.quantiles(record["influenza"])]
    lines = said.splitlines()
    assert [line for table in tables for line in table if line not in lines] == []
    assert f" is {record['eight_schools']['c2st']:.3f} " in said
    inside = record["influenza"]["days_inside"]
    assert f"Of the 14 counts {inside} are inside" in said


@pytest.mark.parametrize(
    ("page", "kind", "lines"),
    [
        ("simulators", "rounds", lambda record: rounds.markdown(record["rounds"])),
        ("choosing", "continuous", continuous.markdown),
    ],
)
def test_a_table_of_a_page_is_that_of_its_result_file(page, kind, lines):
    (record,) = result_files(kind)
    said = (ROOT / "docs" / f"{page}.md").read_text().splitlines()
    assert [line for line in lines(record) if line not in said] == []


def test_the_figures_of_the_readme_are_those_of_the_result_files():
    readme = (ROOT / "README.md").read_text()
    (speed,), (demo,) = result_files("speed"), result_files("demo")
    assert f"| {speed['cold']['seconds']:.0f} s |" in readme
    assert f"| {speed['training']['ratio']:.2f} times |" in readme
    assert f"| {speed['check']['seconds']:.1f} s |" in readme
    assert f"| {demo['seconds']['total']:.0f} s |" in readme
    for record in (*runs(), speed, demo):
        assert (record["machine"]["cores"], record["machine"]["device"]) == (2, "cpu")
        assert record.get("outside_support", 0.0) == 0.0
