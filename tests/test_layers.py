"""Imports point downward only, and nothing heavy is imported before it is used."""

import ast
import dataclasses
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sbi_flows

ROOT = Path(__file__).parents[1]

# Each unit of sbi_flows (a module, or a folder of modules) and the units that it may import; a new
# one needs a line here. `typing`, `errors`, `checks`, `precision` and `whole` are open to all.
MAY_IMPORT = {
    "prior_tails": set(),
    "prior_maps": {"prior_tails"},
    "prior_checks": set(),
    "prior": {"prior_checks", "prior_maps"},
    "prior_box": {"prior", "prior_maps"},
    "worker": set(),
    "processes": {"worker"},
    "execution": {"processes", "worker"},
    "data": {"prior"},
    "lanes": {"prior"},
    "simulating": {"prior", "data", "execution", "lanes", "worker"},
    "failures": {"worker"},
    "store_chunks": {"data"},
    "store": {
        "prior",
        "data",
        "checksums",
        "execution",
        "failures",
        "simulating",
        "store_chunks",
        "worker",
    },
    "classifier": set(),
    "validity": {"classifier", "prior", "data"},
    "networks": set(),
    "standardise": set(),
    "quantised": set(),
    "screening": set(),
    "compilation": set(),
    "checksums": set(),
    "bijectors": {"networks", "prior", "prior_maps"},
    "densities": {"bijectors", "networks", "prior", "data", "standardise"},
    "training": {"checksums", "densities", "networks", "prior", "data"},
    "mixtures": {"densities", "networks", "prior", "prior_maps"},
    "spaces": set(),
    "typicality": {"densities", "spaces", "standardise"},
    "posteriors": {
        "arviz_groups",
        "densities",
        "mixtures",
        "prior",
        "data",
        "standardise",
        "typicality",
    },
    "composed": {"densities", "mixtures", "posteriors", "prior"},
    "estimators": {
        "densities",
        "execution",
        "prior_box",
        "simulating",
        "store",
        "worker",
        "networks",
        "posteriors",
        "prior",
        "data",
        "quantised",
        "record",
        "screening",
        "standardise",
        "training",
        "typicality",
    },
    "quantile_maps": set(),
    "reweighting": set(),
    "conformal_sets": {"diagnostics", "quantile_maps", "prior", "data"},
    "recalibration": {"diagnostics", "quantile_maps", "prior", "prior_maps", "data"},
    "arviz_groups": {"prior"},
    "plots": {"posteriors", "prior", "data"},
    "record": {"data"},
    "artefact": {
        "conformal_sets",
        "densities",
        "diagnostics",
        "networks",
        "posteriors",
        "prior",
        "prior_box",
        "prior_checks",
        "quantile_maps",
        "recalibration",
        "record",
        "spaces",
        "standardise",
        "typicality",
    },
    "diagnostics": {
        "posteriors",
        "prior",
        "data",
        "record",
        "reweighting",
        "simulating",
        "standardise",
        "typicality",
    },
    "plots_local": {"plots"},
    "plots_typicality": {"plots"},
}
OPEN = {"typing", "errors", "checks", "precision", "whole"}
# methods such as `report.plot()` and `posterior.save()` may reach up when they are called
WITHIN_CALLS = {
    "plots",
    "plots_local",
    "plots_typicality",
    "artefact",
    "arviz_groups",
    "diagnostics",
}
# what a simulator may know of the library
FOR_SIMULATORS = {"prior", "data", "execution", "processes", "worker", *OPEN}

HEAVY = {"arviz", "dask", "diffrax", "matplotlib", "pandas", "sklearn", "xarray", "zarr"}


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported name; `deferred` inside a function body."""

    name: str
    line: int
    deferred: bool

    @property
    def package(self) -> str:
        return self.name.split(".")[0]

    @property
    def unit(self) -> str:
        """Unit of sbi_flows; a name exported by the package itself counts as `__init__`."""
        parts = self.name.split(".")
        known = len(parts) > 1 and (parts[1] in MAY_IMPORT or parts[1] in OPEN)
        return parts[1] if known else "__init__"


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
    # a block for type checkers alone is never run
    checkers_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, deferred=deferred or checkers_only)


def upward(unit: str, source: str) -> list[str]:
    """Imports by which a module of sbi_flows reaches beyond its layer."""
    allowed = MAY_IMPORT.get(unit, set()) | OPEN | {unit}
    found = []
    for imported in imports(source):
        late = imported.deferred and imported.unit in WITHIN_CALLS
        own = imported.package == "sbi_flows" and (imported.unit in allowed or late)
        if imported.package in {"sbi_flows", "simulators", "benchmarks", "tests"} and not own:
            found.append(f"line {imported.line}: {unit} imports {imported.name}")
    return found


def beyond_simulators(source: str) -> list[str]:
    """Imports that a simulator may not make."""
    return [
        f"line {i.line}: {i.name}"
        for i in imports(source)
        if i.package in {"benchmarks", "tests"}
        or (i.package == "sbi_flows" and i.unit not in FOR_SIMULATORS)
    ]


def heavy(source: str) -> list[str]:
    """Heavy packages imported when the module is."""
    return [
        f"line {i.line}: {i.name}" for i in imports(source) if i.package in HEAVY and not i.deferred
    ]


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def unit_of(path: Path) -> str:
    return path.relative_to(ROOT / "sbi_flows").parts[0].removesuffix(".py")


def test_every_unit_has_its_layer():
    units = {unit_of(path) for path in modules("sbi_flows")}
    assert units, "no modules found"
    assert units - {"__init__"} <= MAY_IMPORT.keys() | OPEN, (
        "give the new unit a line in MAY_IMPORT"
    )


def test_what_the_package_offers_is_there_when_it_is_asked_for():
    assert {"NPE", "simulate", "check", "plots"} <= set(sbi_flows.__all__)
    assert [name for name in sbi_flows.__all__ if not hasattr(sbi_flows, name)] == []
    with pytest.raises(AttributeError, match="nothing"):
        _ = sbi_flows.nothing


def test_layers_have_no_cycle():
    order = list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())
    assert set(order) == MAY_IMPORT.keys()


@pytest.mark.parametrize("path", modules("sbi_flows"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path):
    unit, source = unit_of(path), path.read_text()
    if unit == "__init__":
        packages = {i.package for i in imports(source)}
        assert not packages & {"simulators", "benchmarks", "tests"}
    else:
        assert upward(unit, source) == []
    assert heavy(source) == []


@pytest.mark.parametrize("path", modules("simulators"), ids=lambda p: str(p.relative_to(ROOT)))
def test_simulators_know_prior_and_data_only(path):
    assert beyond_simulators(path.read_text()) == []


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("prior", "from sbi_flows.simulations.simulations import Simulations"),
        ("networks", "from sbi_flows import densities"),
        ("diagnostics", "import sbi_flows.training"),
        ("posteriors", "def f():\n    from sbi_flows.training import fit"),
        ("posteriors", "from sbi_flows.plots.figures import corner"),
        ("data", "import sbi_flows as sf"),
        ("data", "from simulators import two_moons"),
    ],
)
def test_an_upward_import_is_found(unit, source):
    assert len(upward(unit, source)) == 1


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        (
            "data",
            "from sbi_flows.prior.prior import Prior, as_prior\nfrom sbi_flows.core.typing import Key",
        ),
        ("densities", "from sbi_flows.densities.base import Density"),
        ("posteriors", "def plot(self):\n    from sbi_flows.plots.figures import corner"),
    ],
)
def test_a_downward_import_passes(unit, source):
    assert upward(unit, source) == []


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
def test_using_the_library_loads_nothing_heavy():
    loaded = loaded_by("import sbi_flows; sbi_flows.NPE, sbi_flows.check")
    assert "sbi_flows.estimators.npe" in loaded
    assert not HEAVY & loaded
