"""Neural spline and continuous flows as neural posterior estimators, in JAX.

prior + simulator -> Simulations -> estimator.fit -> Posterior -> diagnostics, plots, ArviZ, numpyro

`__init__.pyi` lists the names for most scripts; each is imported when it is first used. The rest
is reached as `errors.X`, `densities.X`, `networks.X`, `posteriors.X` and `diagnostics.X`.
"""

import importlib
from typing import Any

import lazy_loader

from sbi_flows.core import moved as _moved

_lazy_getattr, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_moved.install()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used; names of earlier versions work as well."""
    if name == "errors":
        return importlib.import_module("sbi_flows.core.errors")
    module = _moved.FORMER_NAMES.get(name)
    if module is not None:
        return getattr(importlib.import_module(f"sbi_flows.{module}"), name)
    return _lazy_getattr(name)
