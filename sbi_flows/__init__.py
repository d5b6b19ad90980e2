"""Neural spline flows as neural posterior estimators, in JAX.

prior + simulator -> Simulations -> estimator.fit -> Posterior -> diagnostics, plots, ArviZ

What the package offers is listed in `__init__.pyi`, and imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
