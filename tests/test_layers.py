"""Twelve rooms, imports that point downward only, and nothing heavy before it is used."""

import ast
import dataclasses
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sbi_flows
from sbi_flows.core import moved

ROOT = Path(__file__).parents[1]

ROOMS = (
    "core",
    "plots",
    "prior",
    "observations",
    "simulations",
    "networks",
    "densities",
    "training",
    "artefact",
    "posteriors",
    "estimators",
    "diagnostics",
)
"""The folders of sbi_flows from the ground upward: a file may import from its own folder and from
those before it, wherever in the file the import stands."""

# what a simulator may know of the library
FOR_SIMULATORS = {"core", "prior", "simulations"}

HEAVY = {"arviz", "dask", "diffrax", "matplotlib", "pandas", "sklearn", "xarray", "zarr"}


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported name; `deferred` inside a function body or for type checkers alone."""

    name: str
    line: int
    deferred: bool

    @property
    def package(self) -> str:
        return self.name.split(".")[0]

    @property
    def room(self) -> str:
        """Folder of sbi_flows; a name exported by the package itself counts as `__init__`."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"


def imports(source: str) -> Iterator[Import]:
    """Every absolute import of a module's source."""
    yield from _walk(ast.parse(source), deferred=False)


def _walk(node: ast.AST, *, deferred: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, deferred) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        names = (f"{node.module}.{alias.name}" for alias in node.names)
        yield from (Import(name, node.lineno, deferred) for name in names)
    deferred |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    checkers_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, deferred=deferred or checkers_only)


def upward(room: str, source: str) -> list[str]:
    """Imports by which a module of a room reaches a room above it, or leaves the house."""
    below = set(ROOMS[: ROOMS.index(room) + 1])
    return [
        f"line {i.line}: {room} imports {i.name}"
        for i in imports(source)
        if i.package in {"simulators", "benchmarks", "tests"}
        or (i.package == "sbi_flows" and i.room not in below)
    ]


def beyond_simulators(source: str) -> list[str]:
    """Imports that a simulator may not make."""
    return [
        f"line {i.line}: {i.name}"
        for i in imports(source)
        if i.package in {"benchmarks", "tests"}
        or (i.package == "sbi_flows" and i.room not in FOR_SIMULATORS)
    ]


def heavy(source: str) -> list[str]:
    """Heavy packages imported when the module is."""
    return [
        f"line {i.line}: {i.name}" for i in imports(source) if i.package in HEAVY and not i.deferred
    ]


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def edges(sources: dict[str, str]) -> dict[str, set[str]]:
    """For each module, the others of the same sources that it imports, anywhere in the file."""
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        found = set()
        for imported in imports(source):
            whole, parent = imported.name, imported.name.rpartition(".")[0]
            found |= {each for each in (whole, parent) if each in sources}
            if whole in sources:  # a module, not a name in its package's `__init__`
                found.discard(parent)
        graph[name] = found - {name}
    return graph


def require_no_circle(sources: dict[str, str]) -> None:
    """Raise `graphlib.CycleError` where files import each other in a circle."""
    graphlib.TopologicalSorter(edges(sources)).prepare()


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "sbi_flows").parts[0].removesuffix(".py")


def test_the_house_has_twelve_rooms_and_no_file_outside():
    assert {room_of(path) for path in modules("sbi_flows")} == {"__init__", *ROOMS}
    assert len(ROOMS) == len(set(ROOMS)) == 12


def test_every_room_says_what_lives_there():
    for room in ROOMS:
        source = (ROOT / "sbi_flows" / room / "__init__.py").read_text()
        assert ast.get_docstring(ast.parse(source)), room


@pytest.mark.parametrize("path", modules("sbi_flows"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path):
    room, source = room_of(path), path.read_text()
    if room == "__init__":
        packages = {i.package for i in imports(source)}
        assert not packages & {"simulators", "benchmarks", "tests"}
    else:
        assert upward(room, source) == []
    assert heavy(source) == []


@pytest.mark.parametrize("package", ["sbi_flows", "simulators", "benchmarks"])
def test_no_files_import_each_other_in_a_circle(package):
    require_no_circle({module_name(path): path.read_text() for path in modules(package)})


def test_a_circle_is_found_in_function_bodies_too():
    one, two = "from p.b import f", "def f():\n    from p import a"
    with pytest.raises(graphlib.CycleError):
        require_no_circle({"p": "", "p.a": one, "p.b": two})
    require_no_circle({"p": "", "p.a": one, "p.b": "from p.c import g", "p.c": ""})


def test_what_the_package_offers_is_there_when_it_is_asked_for():
    assert {"NPE", "simulate", "check", "plots"} <= set(sbi_flows.__all__)
    assert [name for name in sbi_flows.__all__ if not hasattr(sbi_flows, name)] == []
    with pytest.raises(AttributeError, match="nothing"):
        _ = sbi_flows.nothing


def test_the_surface_is_small_and_every_earlier_name_still_works():
    assert len(sbi_flows.__all__) <= 64
    assert not set(sbi_flows.__all__) & moved.FORMER_NAMES.keys()
    for name in moved.FORMER_NAMES:
        assert getattr(sbi_flows, name).__name__ == name
    assert sbi_flows.errors.SolveFailed is sbi_flows.SolveFailed
    assert sbi_flows.densities.Heun is sbi_flows.Heun
    assert sbi_flows.posteriors.ConformalPosterior is sbi_flows.ConformalPosterior


@pytest.mark.parametrize("path", modules("simulators"), ids=lambda p: str(p.relative_to(ROOT)))
def test_simulators_know_prior_and_simulations_only(path):
    assert beyond_simulators(path.read_text()) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("prior", "from sbi_flows.simulations.simulations import Simulations"),
        ("networks", "from sbi_flows import densities"),
        ("training", "import sbi_flows.diagnostics"),
        ("posteriors", "def f():\n    from sbi_flows.estimators.npe import NPE"),
        ("posteriors", "if TYPE_CHECKING:\n    from sbi_flows.diagnostics.check import Report"),
        ("simulations", "import sbi_flows as sf"),
        ("simulations", "from simulators import two_moons"),
    ],
)
def test_an_upward_import_is_found(room, source):
    assert len(upward(room, source)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("simulations", "from sbi_flows.prior.prior import Prior\nimport sbi_flows.core.typing"),
        ("densities", "from sbi_flows.densities.base import Density"),
        ("posteriors", "def plot(self):\n    from sbi_flows.plots import corner"),
    ],
)
def test_a_downward_import_passes(room, source):
    assert upward(room, source) == []


def test_a_simulator_that_imports_the_library_is_found():
    assert beyond_simulators("from sbi_flows.prior.prior import as_prior") == []
    assert beyond_simulators("import sbi_flows as sf") == ["line 1: sbi_flows"]
    assert len(beyond_simulators("from sbi_flows.training import fit")) == 1


def test_a_heavy_import_is_found_unless_it_waits():
    assert heavy("from sklearn.neural_network import MLPClassifier") != []
    assert heavy("class A:\n    import matplotlib.pyplot as plt") != []
    assert heavy("def f():\n    import arviz") == []
    assert heavy("if TYPE_CHECKING:\n    import arviz") == []


def loaded_by(code):
    """Modules that a new process has loaded after the code."""
    arguments = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.newest
def test_importing_the_library_loads_nothing_large():
    """What the library offers is imported when it is first asked for, and JAX with it."""
    loaded = loaded_by("import sbi_flows")
    assert "sbi_flows" in loaded
    assert not {"jax", "flax", "distrax", "numpyro", "optax", "scipy", *HEAVY} & loaded


@pytest.mark.newest
def test_a_worker_process_loads_no_jax():
    loaded = loaded_by("import sbi_flows.simulations.worker")
    assert "sbi_flows.simulations.worker" in loaded
    assert not {"jax", "flax", "distrax", "numpyro", "optax", "scipy", *HEAVY} & loaded


@pytest.mark.newest
def test_using_the_library_loads_nothing_heavy():
    loaded = loaded_by("import sbi_flows; sbi_flows.NPE, sbi_flows.check")
    assert "sbi_flows.estimators.npe" in loaded
    assert not HEAVY & loaded
