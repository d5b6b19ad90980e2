"""Old module paths, which can still be imported.

In earlier versions all modules were in one folder: `sbi_flows.data`, for example, is now
`sbi_flows.simulations.simulations`. An import of an old path returns the module at the new path and
gives a `DeprecationWarning`, once. This module imports only the standard library.

Public names: `MOVED`, `FORMER_NAMES`, `install`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType

_PACKAGE = __name__.partition(".")[0]

FORMER_NAMES = {
    "Ancestral": "densities.samplers",
    "ArtefactError": "core.errors",
    "CheckpointSpoilt": "core.errors",
    "ConformalPosterior": "posteriors.conformal",
    "EDM": "densities.paths",
    "Heun": "densities.samplers",
    "LocalCheck": "diagnostics",
    "RecalibratedPosterior": "posteriors.recalibrated",
    "SbiFlowsError": "core.errors",
    "SbiFlowsWarning": "core.errors",
    "SimulationFailed": "core.errors",
    "SolveFailed": "core.errors",
    "StoreBusy": "core.errors",
    "StoreSpoilt": "core.errors",
    "Straight": "densities.paths",
    "TrainingDiverged": "core.errors",
    "VE": "densities.paths",
    "VP": "densities.paths",
    "Validity": "simulations.validity",
    "WeightsUneven": "core.errors",
    "c2st_jax": "diagnostics",
    "sample_composed": "posteriors.composed",
}
"""Names that were at the top of the package in earlier versions, with their modules.

They can still be imported from the top."""

MOVED = {
    "arviz_groups": "posteriors.arviz",
    "artefact.files": "posteriors.reading",
    "bijectors": "densities.bijectors",
    "bijectors.autoregressive": "densities.bijectors.autoregressive",
    "bijectors.coupling": "densities.bijectors.coupling",
    "bijectors.linear": "densities.bijectors.linear",
    "bijectors.repeated": "densities.bijectors.repeated",
    "bijectors.spline": "densities.bijectors.spline",
    "bijectors.truncated": "densities.bijectors.truncated",
    "checks": "core.checks",
    "checksums": "core.checksums",
    "classifier": "simulations.classifier",
    "compilation": "core.compilation",
    "conformal_sets": "posteriors.conformal",
    "data": "simulations.simulations",
    "diagnostics.misspecification": "observations.misspecification",
    "diagnostics.tables": "core.tables",
    "errors": "core.errors",
    "execution": "simulations.executors",
    "failures": "simulations.failures",
    "mixtures": "posteriors.mixtures",
    "plots_local": "plots.local",
    "plots_typicality": "plots.typicality",
    "precision": "core.precision",
    "prior_box": "prior.box",
    "prior_checks": "prior.checks",
    "prior_maps": "prior.maps",
    "prior_tails": "prior.tails",
    "quantile_maps": "posteriors.quantile_maps",
    "quantised": "observations.quantised",
    "recalibration": "posteriors.recalibrated",
    "record": "core.record",
    "reweighting": "posteriors.reweighting",
    "screening": "observations.screening",
    "simulating": "simulations.simulate",
    "spaces": "observations.spaces",
    "standardise": "observations.standardise",
    "store": "simulations.store",
    "typicality": "observations.typicality",
    "typing": "core.typing",
    "validity": "simulations.validity",
    "whole": "core.files",
}
"""New path of each module by its old path, both without the leading "sbi_flows.".

The old module `composed` is missing, because `sbi_flows` now has a function of that name."""

PUBLIC = {"errors"}
"""Old paths that users may continue to import; they give no warning."""


class _Loader(importlib.abc.Loader):
    """Loader that returns the module at the new path."""

    def __init__(self, old: str) -> None:
        self.old, self.new_name = old, f"{_PACKAGE}.{MOVED[old]}"

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Import the module at its new path."""
        module = importlib.import_module(self.new_name)
        self.new_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Warn, and restore the module's spec: Python replaced it by the old path's spec."""
        module.__spec__ = self.new_spec
        if self.old in PUBLIC:
            return
        warnings.warn(
            f"{_PACKAGE}.{self.old} is now {self.new_name}: import it from there, or from "
            f"{_PACKAGE} itself",
            DeprecationWarning,
            stacklevel=2,
        )


class _Finder(importlib.abc.MetaPathFinder):
    """Finder of old module paths."""

    def find_spec(
        self, fullname: str, path: object, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of an old path, or None for any other name."""
        package, _, old = fullname.partition(".")
        if package != _PACKAGE or old not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, _Loader(old))


def install() -> None:
    """Make old module paths importable. A second call has no effect."""
    # first in the list: Python's own finder would load the modules of `bijectors` a second time
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
