"""Spline flow of flowjax.

Public names: `FlowjaxFlow`, `flowjax_peer`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.scipy.special import ndtr, ndtri
from jax.scipy.stats import norm

import sbi_flows as sf
from benchmarks.peers.contestant import Fit, Recipe, Watch
from sbi_flows.core.typing import Obs
from sbi_flows.observations.standardise import fit_standardiser
from sbi_flows.prior.maps import HALF_WIDTH


class FlowjaxFlow:
    """Conditional flow of flowjax, in coordinates in which the prior is a standard normal.

    In these coordinates every draw lies within the prior's support, and the untrained flow is close
    to the prior. Observations are standardised in the same way as in sbi_flows.
    """

    def __init__(self, prior: sf.Prior, recipe: Recipe) -> None:
        """Store the settings. `fit` builds the flow, because its sizes depend on the data."""
        self._prior, self._recipe = prior, recipe
        self._flow: Any = None
        self._standardiser: Any = None
        self._starts: dict[int, Any] = {}

    def describe(self) -> dict[str, Any]:
        """Describe the architecture, the coordinates and the number of parameters."""
        recipe = self._recipe
        name = "coupling_flow" if recipe.coupling else "masked_autoregressive_flow"
        return {
            "density": (
                f"{name}(flow_layers={recipe.transforms}, nn_width={recipe.hidden[0]}, "
                f"nn_depth={len(recipe.hidden)}), RationalQuadraticSpline("
                f"knots={recipe.bins - 1}, interval={recipe.bound:g})"
            ),
            "coordinates": "standard normal by the prior's CDF; our features of x",
            "validation": "complete batches of validation rows; the best weights are kept",
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(_split(self._flow)[0])),
            "versions": {"flowjax": importlib.metadata.version("flowjax")},
        }

    def fit(
        self,
        theta: np.ndarray,
        x: Obs,
        *,
        seed: int,
        epochs: int,
        patience: int,
        watch: Watch | None = None,
    ) -> Fit:
        """Call flowjax's `fit_to_data`; with `watch`, call its training step in a loop instead."""
        x = jax.tree.map(jnp.asarray, x)
        y, features, self._standardiser = _prepared(self._prior, jnp.asarray(theta), x)
        start, key = self._start(seed, y.shape[1], features.shape[1]), jax.random.key(seed)
        if watch is None:
            self._flow, done = self._trainer.fit(key, start, (y, features), epochs, patience)
        else:
            done = self._watched(key, start, (y, features), epochs, patience, watch)
        held_out = round(self._recipe.held_out * len(y))
        return Fit(done, done * ((len(y) - held_out) // self._recipe.batch))

    def sample(self, x: Obs, n: int, *, seed: int) -> np.ndarray:
        """Draw from the flow, and map the draws to the prior's support."""
        draw, _ = _compiled()
        features = self._standardiser(x)
        return np.asarray(draw(self._prior, self._flow, jax.random.key(seed), features, n))

    def log_prob(self, theta: np.ndarray, x: Obs) -> np.ndarray:
        """Add the log density of the flow and the log Jacobian of the coordinates."""
        _, evaluate = _compiled()
        features = self._standardiser(x)
        return np.asarray(evaluate(self._prior, self._flow, jnp.asarray(theta), features))

    @cached_property
    def _trainer(self) -> _Trainer:
        return _trainer(self._recipe)

    def _start(self, seed: int, dim: int, context: int) -> Any:
        """Return the untrained flow. It is cached, as building it takes longer than an epoch."""
        if seed not in self._starts:
            self._starts[seed] = make_flow(jax.random.key(seed), dim, context, self._recipe)
        return self._starts[seed]

    def _watched(
        self,
        key: Array,
        flow: Any,
        rows: tuple[Array, Array],
        epochs: int,
        patience: int,
        watch: Watch,
    ) -> int:
        """Fit with a callback after each epoch; return the number of epochs."""
        import equinox as eqx

        order_key, epoch_key = jax.random.split(key)
        order = jax.random.permutation(order_key, len(rows[0]))
        held_out = round(self._recipe.held_out * len(order))
        train, validation = order[held_out:], [a[order[:held_out]] for a in rows]
        best_flow, (params, static) = flow, _split(flow)
        state, best_loss = self._trainer.optimizer.init(params), np.inf
        epoch, best_epoch = 0, 0
        while epoch < epochs and epoch - best_epoch < patience:
            batches = jax.random.permutation(jax.random.fold_in(epoch_key, epoch), train)
            params, state = self._epoch(params, static, state, rows, batches)
            loss, epoch = float(self._trainer.loss(params, static, *validation)), epoch + 1
            self._flow = eqx.combine(params, static)
            if loss < best_loss:
                best_flow, best_loss, best_epoch = self._flow, loss, epoch
            watch()
        self._flow = best_flow
        return epoch

    def _epoch(
        self, params: Any, static: Any, state: Any, rows: tuple[Array, Array], order: Array
    ) -> tuple[Any, Any]:
        from flowjax.train import step  # pyright: ignore[reportMissingImports]

        trainer, batch = self._trainer, self._recipe.batch
        for i in range(len(order) // batch):
            chosen = order[i * batch : (i + 1) * batch]
            params, state, _ = step(
                params,
                static,
                *(a[chosen] for a in rows),
                optimizer=trainer.optimizer,
                opt_state=state,
                loss_fn=trainer.loss,
            )
        return params, state


def flowjax_peer(
    y: Array, features: Array, recipe: Recipe, *, epochs: int
) -> Callable[[], float] | None:
    """Prepare timed fits of a flowjax flow for the density of parameters y given features.

    Args:
        y: Parameters, shape (N, d), used without a change of coordinates.
        features: Features of the observations, shape (N, C), used without standardisation.
        recipe: Sizes of the flow and settings of the training.
        epochs: Number of epochs of each fit.

    Returns:
        A function that runs one fit, including validation, and returns its time in seconds. The
        first call includes compilation. The result is None if flowjax is not installed.
    """
    if importlib.util.find_spec("flowjax") is None:
        return None
    flow = make_flow(jax.random.key(0), y.shape[1], features.shape[1], recipe)
    trainer = _trainer(recipe)

    def fit() -> float:
        start = time.perf_counter()
        trainer.fit(jax.random.key(1), flow, (y, features), epochs, epochs)
        return time.perf_counter() - start

    return fit


def make_flow(key: Array, dim: int, context: int, recipe: Recipe) -> Any:
    """Make an untrained flow for `dim` parameters given `context` features."""
    from flowjax import flows  # pyright: ignore[reportMissingImports]
    from flowjax.bijections import RationalQuadraticSpline  # pyright: ignore[reportMissingImports]
    from flowjax.distributions import Normal  # pyright: ignore[reportMissingImports]

    build = flows.coupling_flow if recipe.coupling else flows.masked_autoregressive_flow
    return build(
        key,
        base_dist=Normal(np.zeros(dim)),
        # n inner knots make n + 1 bins
        transformer=RationalQuadraticSpline(knots=recipe.bins - 1, interval=recipe.bound),
        cond_dim=context,
        flow_layers=recipe.transforms,
        nn_width=recipe.hidden[0],
        nn_depth=len(recipe.hidden),
    )


class _Trainer(NamedTuple):
    """Optimiser and loss for all fits. A new optimiser or loss would cause recompilation."""

    optimizer: optax.GradientTransformation
    loss: Any
    recipe: Recipe

    def fit(
        self, key: Array, flow: Any, rows: tuple[Any, Any], epochs: int, patience: int
    ) -> tuple[Any, int]:
        """Call `fit_to_data`; return the fitted flow and the number of epochs."""
        from flowjax.train import fit_to_data  # pyright: ignore[reportMissingImports]

        fitted, losses = fit_to_data(
            key,
            flow,
            rows,
            loss_fn=self.loss,
            optimizer=self.optimizer,
            max_epochs=epochs,
            max_patience=patience,
            batch_size=self.recipe.batch,
            val_prop=self.recipe.held_out,
            show_progress=False,
        )
        jax.block_until_ready(jax.tree.leaves(fitted))
        return fitted, len(losses["train"])


def _trainer(recipe: Recipe) -> _Trainer:
    from flowjax.train.losses import MaximumLikelihoodLoss  # pyright: ignore[reportMissingImports]

    adam = optax.adam(recipe.learning_rate)
    if recipe.clip_norm is not None:
        adam = optax.chain(optax.clip_by_global_norm(recipe.clip_norm), adam)
    return _Trainer(adam, MaximumLikelihoodLoss(), recipe)


def _split(flow: Any) -> tuple[Any, Any]:
    """Split a flow into its trainable parameters and its other parts."""
    import equinox as eqx
    import paramax  # pyright: ignore[reportMissingImports]

    return eqx.partition(
        flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )


@cache
def _compiled() -> tuple[Any, Any]:
    import equinox as eqx

    return eqx.filter_jit(_sample), eqx.filter_jit(_log_prob)


def _sample(prior: sf.Prior, flow: Any, key: Array, features: Array, n: int) -> Array:
    y = jnp.moveaxis(flow.sample(key, (n,), condition=features), 0, 1)
    bounded = jnp.asarray(prior.bounded)
    return prior.unchecked_from_standard(jnp.where(bounded, HALF_WIDTH * (2.0 * ndtr(y) - 1.0), y))


def _log_prob(prior: sf.Prior, flow: Any, theta: Array, features: Array) -> Array:
    y, log_det = _to_normal(prior, theta)
    return flow.log_prob(y, condition=features[:, None]) - log_det


@jax.jit
def _prepared(prior: sf.Prior, theta: Array, x: Obs) -> tuple[Array, Array, Any]:
    standardiser = fit_standardiser(x)
    return _to_normal(prior, theta)[0], standardiser(x), standardiser


def _to_normal(prior: sf.Prior, theta: Array) -> tuple[Array, Array]:
    """Map theta to coordinates y in which the prior is a standard normal.

    Returns:
        The coordinates y, and the log determinant of the Jacobian d theta / d y.
    """
    standard = prior.to_standard(theta)
    bounded = jnp.asarray(prior.bounded)
    y = jnp.where(bounded, ndtri(0.5 * (standard / HALF_WIDTH + 1.0)), standard)
    log_slope = jnp.where(bounded, np.log(2.0 * HALF_WIDTH) + norm.logpdf(y), 0.0)
    return y, prior.standard_log_det(standard, theta) + jnp.sum(log_slope, axis=-1)
