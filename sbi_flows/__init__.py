"""Neural spline flows as neural posterior estimators, in JAX.

prior + simulator -> Simulations -> estimator.fit -> Posterior -> diagnostics, plots, ArviZ

The names that the package offers are listed in `__init__.pyi`. Each is imported when it is first
used.
"""

import lazy_loader

from sbi_flows.core import moved as _moved

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_moved.install()
