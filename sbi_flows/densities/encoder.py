"""Frozen encoder: a network that was trained elsewhere, and maps observations to vectors.

Public names: `Network`, `Encoder`, `check_network`, `takes_mask`, `encode`, `encoded_rows`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tqdm.auto import tqdm

from sbi_flows.core.precision import full_precision
from sbi_flows.core.pytrees import register_pytree
from sbi_flows.core.typing import Obs

BATCH_ROWS = 256
"""Number of rows that are encoded in one compiled call."""

TEST_ROWS = 16
"""Number of rows that are encoded a second time, in another batch."""

TOLERANCE = 1e-3
"""Maximum difference between the codes of one row in two batches, relative to the largest code of
the same column."""

Network = nnx.Module | Callable[..., Array]
"""A flax module, or a pure JAX function, that maps observations (B, *event) to codes (B, F)."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Encoder:
    """Frozen network. An `Encoder` is a pytree, whose arrays are the weights of the network.

    Attributes:
        graph: Static part of a flax module, or the function.
        weights: State of a flax module; empty for a function.
    """

    graph: Any
    weights: Any

    @classmethod
    def of(cls, network: Network) -> Encoder:
        """Freeze a network; later changes of the network have no effect.

        Raises:
            ValueError: The network is neither a flax module nor a function.
        """
        check_network(network)
        if isinstance(network, nnx.Module):
            graph, state = nnx.split(network)
            return cls(graph, jax.tree.map(jnp.asarray, nnx.as_pure(state)))
        return cls(network, {})

    def __call__(self, x: Obs, mask: Obs | None = None) -> Array:
        """Map observations (B, *event), in the user's units, to codes (B, F).

        Args:
            x: The observations; missing entries are zero.
            mask: For each array, True where an entry is present; None if all are present.
        """
        network = self.graph
        if isinstance(self.graph, nnx.GraphDef):
            network = nnx.merge(self.graph, self.weights)
        given = {} if mask is None else {"mask": mask}
        return network(x, **given)


register_pytree(Encoder, leaves=("weights",), static=("graph",))


def check_network(network: Any) -> None:
    """Raise ValueError unless a value is a flax module or a function of one argument."""
    if isinstance(network, type) or not callable(network):
        raise ValueError(
            "network: expected a trained flax nnx.Module, or a JAX function of observations "
            f"(B, *event), got {network!r:.80}"
        )
    call = type(network).__call__ if isinstance(network, nnx.Module) else network
    try:
        inspect.signature(call).bind(*([None] * (1 + isinstance(network, nnx.Module))))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"network: expected one argument, x of shape (B, *event): {error}"
        ) from None


def takes_mask(network: Network) -> bool:
    """Return whether a network has an argument `mask`."""
    call = type(network).__call__ if isinstance(network, nnx.Module) else network
    return "mask" in inspect.signature(call).parameters


def encode(encoder: Encoder, x: Obs, *, has_mask: bool) -> Array:
    """Compute the codes (B, F) of observations (B, *event), which may lack entries (NaN).

    Args:
        encoder: The encoder.
        x: The observations.
        has_mask: Whether entries can be missing.

    Raises:
        ValueError: The network does not return an array (B, F).
    """
    size = len(jax.tree.leaves(x)[0])
    codes = _encoded(encoder, x, has_mask)
    if codes.ndim != 2 or len(codes) != size:
        raise ValueError(f"network: expected codes of shape ({size}, F), got {codes.shape}")
    return codes.astype(jnp.result_type(float))


@partial(jax.jit, static_argnums=2)
@full_precision
def _encoded(encoder: Encoder, x: Obs, has_mask: bool) -> Array:
    def one(x: Obs) -> Array:
        mask = None
        if has_mask:
            mask = jax.tree.map(lambda a: ~jnp.isnan(a), x)
            x = jax.tree.map(lambda a, m: jnp.where(m, a, jnp.zeros_like(a)), x, mask)
        return encoder(x, mask)

    count = len(jax.tree.leaves(x)[0])
    if count <= BATCH_ROWS:
        return one(x)
    # blocks limit the memory; the last one repeats rows
    places = jnp.resize(jnp.arange(count), (-(-count // BATCH_ROWS), BATCH_ROWS))
    codes = jax.lax.map(lambda at: one(jax.tree.map(lambda a: a[at], x)), places)
    return codes.reshape(-1, *codes.shape[2:])[:count]


def encoded_rows(encoder: Encoder, x: Obs, *, has_mask: bool, progress: bool) -> np.ndarray:
    """Compute the codes (N, F) of many observations, in memory or on disk, in batches.

    Args:
        encoder: The encoder.
        x: The observations.
        has_mask: Whether entries can be missing.
        progress: Show a progress bar.

    Raises:
        ValueError: The codes of the first observations change if these are encoded in reverse
        order,
            without the other observations of their batch.
    """
    count = len(jax.tree.leaves(x)[0])
    size, parts = min(BATCH_ROWS, count), []
    starts = range(0, count, size)
    for start in tqdm(starts, desc="encode", disable=not progress or len(starts) < 2):
        # the last batch reaches back, so that all batches have one compiled shape
        rows = slice(min(start, count - size), min(start, count - size) + size)
        batch = jax.tree.map(lambda a, rows=rows: np.asarray(a[rows]), x)
        codes = np.asarray(encode(encoder, batch, has_mask=has_mask))
        parts.append(codes[start - rows.start :])
        if not start:
            _require_same_again(encoder, batch, codes, has_mask)
    return np.concatenate(parts)


def _require_same_again(encoder: Encoder, batch: Obs, codes: np.ndarray, has_mask: bool) -> None:
    """Raise ValueError if codes depend on the other rows of a batch, or on the place in it."""
    few = jax.tree.map(lambda a: a[:TEST_ROWS][::-1], batch)
    again = np.asarray(encode(encoder, few, has_mask=has_mask))[::-1]
    # NaN is ignored here; `Encoded.fit` counts rows with codes that are not finite
    difference = np.abs(again - codes[:TEST_ROWS])
    scale = np.nanmax(np.abs(codes), axis=0, initial=1e-30)
    if np.any(difference > TOLERANCE * scale[None]):
        raise ValueError(
            "network: expected the same code for an observation in every batch, got codes that "
            f"differ by {np.nanmax(difference):.2g}; set BatchNorm and Dropout to evaluation with "
            "network.eval()"
        )
