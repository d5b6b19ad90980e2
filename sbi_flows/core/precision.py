"""Precision of matrix products: full, unless somebody asks for less.

Left to themselves, products of 32-bit numbers keep 10 bits of the mantissa on an NVIDIA GPU
(TensorFloat-32) and 7 on a TPU (bfloat16). A density would no longer integrate to one, and would
not be that of its own draws.

Public names: `FULL`, `full_precision`, `products_in`, `inherited`.
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
"""For the products of bijectors, which stay in full precision whatever the networks do."""


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """The function with its products in full precision, unless the user has told JAX otherwise.

    For what `jax.jit` traces: the context of whoever calls a compiled program does not reach the
    threads that compile.

    Example:
        >>> import jax.numpy as jnp
        >>> square = full_precision(lambda a: a @ a)
        >>> jax.make_jaxpr(square)(jnp.ones((2, 2))).eqns[0].params["precision"][0].name
        'HIGHEST'
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision(_asked() or "highest"):
            return function(*args, **kwargs)

    return wrapped


def products_in(precision: str | None) -> AbstractContextManager[None]:
    """Context in which products are computed in this precision; None leaves it as it is.

    `"bfloat16"` means that both factors are rounded to it and their products added in 32 bits, on
    a GPU too, where JAX by this name would give TensorFloat-32.
    """
    if precision is None:
        return nullcontext()
    named = {"bfloat16": "BF16_BF16_F32"} if jax.default_backend() == "gpu" else {}
    return jax.default_matmul_precision(named.get(precision, precision))


def inherited() -> Callable[[], None]:
    """Makes another thread compute in the precision that holds in this one; call it there."""
    precision = _asked()

    def adopt() -> None:
        if precision is not None:
            # the setting is of the thread, and ends with it
            jax.default_matmul_precision(precision).__enter__()

    return adopt


def _asked() -> str | None:
    return getattr(jax.config, "jax_default_matmul_precision", None)
