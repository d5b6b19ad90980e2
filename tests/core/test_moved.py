"""Old module paths can be imported, and warn with the new path."""

import importlib
import subprocess
import sys
import warnings

import pytest

import sbi_flows
from sbi_flows.core import moved


@pytest.mark.parametrize("old", sorted(moved.MOVED.keys() - moved.PUBLIC))
def test_an_old_path_is_the_module_at_its_new_path(old):
    name, new = f"sbi_flows.{old}", f"sbi_flows.{moved.MOVED[old]}"
    expected = importlib.import_module(new)
    if old.startswith("bijectors."):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            importlib.import_module("sbi_flows.bijectors")
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=f"^{name} is now {new}: import it") as caught:
        module = importlib.import_module(name)
    assert module is expected and sys.modules[name] is expected
    assert (module.__name__, module.__spec__.name) == (new, new)
    assert len(caught) == 1
    with warnings.catch_warnings():  # a second import is silent
        warnings.simplefilter("error")
        importlib.import_module(name)


def test_no_module_stands_at_an_old_path():
    root = sbi_flows.__path__[0]
    finder = importlib.machinery.PathFinder()
    tops = [old for old in moved.MOVED if "." not in old]
    assert [old for old in tops if finder.find_spec(f"sbi_flows.{old}", [root])] == []
    # the import of a module replaces a function of the same name in its package
    assert set(tops) & set(sbi_flows.__all__) <= moved.PUBLIC


def test_a_user_who_imports_from_an_old_path_is_told_the_new_one():
    program = (
        "import sys\n"
        "import sbi_flows\n"
        "assert 'jax' not in sys.modules\n"
        "from sbi_flows.data import Simulations\n"
        "from sbi_flows.bijectors.spline import *\n"
        "import sbi_flows.errors\n"
        "assert Simulations is sbi_flows.Simulations\n"
        "assert sbi_flows.errors.SolveFailed is sbi_flows.SolveFailed\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    said = [line for line in run.stderr.splitlines() if "DeprecationWarning" in line]
    assert said[0] == (
        "<string>:4: DeprecationWarning: sbi_flows.data is now sbi_flows.simulations.simulations: "
        "import it from there, or from sbi_flows itself"
    )
    assert [line.split(" ")[2] for line in said] == [
        "sbi_flows.data",
        "sbi_flows.bijectors",
        "sbi_flows.bijectors.spline",
    ]


def test_names_that_never_existed_are_not_found():
    for name in ("sbi_flows.nothing", "sbi_flows.core.data"):
        with pytest.raises(ModuleNotFoundError, match=name):
            importlib.import_module(name)


def test_a_second_installation_adds_no_finder():
    before = list(sys.meta_path)
    moved.install()
    assert sys.meta_path == before
