"""Precision of matrix products: full by default, lower where the user asks for it.

By default JAX computes products of 32-bit numbers with 10 bits of mantissa on an NVIDIA GPU
(TensorFloat-32) and with 7 on a TPU (bfloat16). A density would then not integrate to one, and
would not be the density of its own draws.

Public names: `FULL`, `full_precision`, `precision_context`, `inherit_precision`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")

FULL = jax.lax.Precision.HIGHEST
"""Full precision. Products inside bijectors always use it, also where the networks use less."""


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function compute its matrix products in full precision.

    A precision that the user has set with `jax.default_matmul_precision` takes priority. Decorate
    the function that `jax.jit` traces: a context around the call of a compiled program does not
    reach the threads that compile it.

    Example:
        >>> import jax.numpy as jnp
        >>> square = full_precision(lambda a: a @ a)
        >>> jax.make_jaxpr(square)(jnp.ones((2, 2))).eqns[0].params["precision"][0].name
        'HIGHEST'
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision(_user_precision() or "highest"):
            return function(*args, **kwargs)

    return wrapped


def precision_context(precision: str | None) -> AbstractContextManager[None]:
    """Return a context in which matrix products use a precision; None changes nothing.

    "bfloat16" rounds both factors to bfloat16 and adds their products in 32 bits, on a GPU too.
    (JAX's own setting of that name selects TensorFloat-32 on a GPU.)

    Args:
        precision: A name that `jax.default_matmul_precision` accepts, or None.
    """
    if precision is None:
        return nullcontext()
    gpu_names = {"bfloat16": "BF16_BF16_F32"} if jax.default_backend() == "gpu" else {}
    return jax.default_matmul_precision(gpu_names.get(precision, precision))


def inherit_precision() -> Callable[[], None]:
    """Return a function that, called in another thread, sets this thread's precision there.

    JAX keeps the setting of `jax.default_matmul_precision` for each thread.
    """
    precision = _user_precision()

    def adopt() -> None:
        if precision is not None:
            # never exited: the setting is local to the thread and ends with it
            jax.default_matmul_precision(precision).__enter__()

    return adopt


def _user_precision() -> str | None:
    """Return the precision that the user has set in this thread, if any."""
    return getattr(jax.config, "jax_default_matmul_precision", None)
