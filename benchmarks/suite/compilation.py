"""Measurement of the time that JAX spends on compilation.

Public name: `compile_seconds`.
"""

from __future__ import annotations

import threading

import jax

_EVENTS = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_lock = threading.Lock()
_spent = 0.0


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    global _spent
    if event in _EVENTS:
        with _lock:
            _spent += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """Return the seconds that JAX spent on lowering and compilation since this module was imported.

    If several threads compile at the same time, their times are added.

    Example:
        >>> before = compile_seconds()
        >>> int(jax.jit(lambda x: 3 * x + 1)(2))
        7
        >>> compile_seconds() > before
        True
    """
    return _spent
