"""Other libraries on the same problem, each as its own users run it.

Public name: `flowjax_peer`.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax import Array


def flowjax_peer(
    y: Array,
    features: Array,
    *,
    transforms: int,
    hidden: tuple[int, ...],
    bins: int,
    bound: float,
    batch: int,
    epochs: int,
    learning_rate: float,
    held_out: float,
) -> Callable[[], float] | None:
    """A coupling spline flow of flowjax on parameters y (N, d) given features (N, C).

    Returns:
        A function that runs one fit of `epochs` epochs, validation included, and returns its
        seconds; its first call compiles. None where flowjax is not installed.
    """
    if importlib.util.find_spec("flowjax") is None:
        return None
    from flowjax.bijections import RationalQuadraticSpline  # pyright: ignore[reportMissingImports]
    from flowjax.distributions import Normal  # pyright: ignore[reportMissingImports]
    from flowjax.flows import coupling_flow  # pyright: ignore[reportMissingImports]
    from flowjax.train import fit_to_data  # pyright: ignore[reportMissingImports]
    from flowjax.train.losses import MaximumLikelihoodLoss  # pyright: ignore[reportMissingImports]

    flow: Any = coupling_flow(
        jax.random.key(0),
        base_dist=Normal(np.zeros(y.shape[1])),
        # n inner knots make n + 1 bins
        transformer=RationalQuadraticSpline(knots=bins - 1, interval=bound),
        cond_dim=features.shape[1],
        flow_layers=transforms,
        nn_width=hidden[0],
        nn_depth=len(hidden),
    )
    # one optimiser and one loss for all fits: new ones would compile anew
    optimizer, loss = optax.adam(learning_rate), MaximumLikelihoodLoss()

    def fit() -> float:
        began = time.perf_counter()
        fitted, _ = fit_to_data(
            jax.random.key(1),
            flow,
            (y, features),
            loss_fn=loss,
            optimizer=optimizer,
            max_epochs=epochs,
            max_patience=epochs,
            batch_size=batch,
            val_prop=held_out,
            show_progress=False,
        )
        jax.block_until_ready(jax.tree.leaves(fitted))
        return time.perf_counter() - began

    return fit
