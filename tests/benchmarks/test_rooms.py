"""Folders of the benchmarks: each has a docstring and imports from earlier folders only."""

import ast

import pytest

from tests.test_layers import ROOT, imports, modules

ROOMS = ("suite", "peers", "speed", "demonstrations")


def test_the_folders_are_these_and_describe_themselves():
    folders = {path.parent for path in modules("benchmarks")} - {ROOT / "benchmarks"}
    assert {folder.name for folder in folders} == set(ROOMS)
    for folder in folders:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_to_earlier_folders(room):
    allowed = ROOMS[: ROOMS.index(room) + 1]
    for path in sorted((ROOT / "benchmarks" / room).glob("*.py")):
        names = [i.name for i in imports(path.read_text()) if i.package == "benchmarks"]
        assert [name for name in names if name.split(".")[1] not in allowed] == [], path
