"""This library with the sizes that its peers are given.

Public name: `Ours`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sbi_flows as sf
from benchmarks.peers.contestant import Fit, Recipe, Watch
from sbi_flows.core.typing import Obs
from sbi_flows.densities.conditional import Blueprint, Sizes, Weights
from sbi_flows.observations.standardise import fit_standardiser
from sbi_flows.simulations.simulations import observation_shape
from sbi_flows.training.ensemble import Ensemble


class Ours:
    """`sf.NPE` with one member and the bare spline flow: no network in front, no dropout.

    The optimiser is plain Adam, and no average of the weights is kept.

    Args:
        prior: The prior.
        recipe: The sizes.
        defaults: Everything as `sf.NPE` has it by default instead, whatever the recipe: four
            members, of each of which the steps are counted, and a fit of a length of its own.
    """

    def __init__(self, prior: sf.Prior, recipe: Recipe, *, defaults: bool = False) -> None:
        """Hold the settings; one optimiser for all fits, as a new one would compile anew."""
        self._prior, self._recipe, self._defaults = prior, recipe, defaults
        self._density = sf.NSF(
            coupling=recipe.coupling,
            transforms=recipe.transforms,
            bins=recipe.bins,
            hidden=recipe.hidden,
            bound=recipe.bound,
            context_width=0,
            dropout=0.0,
        )
        self._optimizer = optax.adam(recipe.learning_rate)
        self._posterior: sf.Posterior | None = None

    def describe(self) -> dict[str, Any]:
        """Density, training and number of parameters."""
        npe, params = self._npe(1, 1), self._fitted.weights[0].params
        return {
            "density": repr(npe.density),
            "members": npe.members,
            "coordinates": "the prior's standard ones, whitened by the linear-Gaussian start",
            "validation": "every validation row; the best weights are kept",
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
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
        """`NPE.fit`; with `watch` its ensemble, epoch by epoch."""
        key = jax.random.key(seed)
        if watch is None:
            npe = self._npe(epochs, patience)
            posterior, history = npe.fit(key, sf.Simulations(theta, x), progress=False)
            jax.block_until_ready(posterior.weights)
            self._posterior = posterior
            done, held_out = history.epochs, history.held_out.shape[1]
        else:
            x = jax.tree.map(jnp.asarray, x)
            # the bare flow's rate is constant, so that any number of epochs is the same program
            npe = sf.NPE(self._prior) if self._defaults else self._npe(1, patience)
            epochs = min(epochs, npe.training.max_epochs) if self._defaults else epochs
            done, held_out = self._watched(npe, key, jnp.asarray(theta), x, epochs, watch)
        rows = len(theta) - held_out
        return Fit(done, npe.members * done * (rows // npe.training.batch(rows)))

    def sample(self, x: Obs, n: int, *, seed: int) -> np.ndarray:
        """`Posterior.sample`."""
        return np.asarray(self._fitted.sample(jax.random.key(seed), x, n))

    def log_prob(self, theta: np.ndarray, x: Obs) -> np.ndarray:
        """`Posterior.log_prob`."""
        return np.asarray(self._fitted.log_prob(theta, x))

    @property
    def _fitted(self) -> sf.Posterior:
        assert self._posterior is not None, "expected a fit before"
        return self._posterior

    def _npe(self, epochs: int, patience: int) -> sf.NPE:
        if self._defaults:
            training = sf.Training(max_epochs=epochs, patience=patience)
            return sf.NPE(self._prior, training=training)
        recipe = self._recipe
        training = sf.Training(
            batch_size=recipe.batch,
            max_epochs=epochs,
            patience=patience,
            validation_fraction=recipe.held_out,
            optimizer=self._optimizer,
            clip_norm=float("inf") if recipe.clip_norm is None else recipe.clip_norm,
            ema_decay=None,
        )
        return sf.NPE(self._prior, self._density, training=training, members=1)

    def _watched(
        self, npe: sf.NPE, key: jax.Array, theta: jax.Array, x: Obs, epochs: int, watch: Watch
    ) -> tuple[int, int]:
        """Number of epochs and of validation rows of a fit that is looked at after each epoch."""
        prior = self._prior
        y, standardiser, like = prior.to_standard(theta), fit_standardiser(x), observation_shape(x)
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(like))
        sizes = Sizes(prior.bounded, jax.tree.structure(like), shapes)
        blueprint = Blueprint(npe.density, None, sizes)
        offset, epoch = prior.standard_log_det(y, theta), 0
        rows = (y, standardiser(x), offset)
        with Ensemble(key, blueprint, npe.training, *rows, npe.members) as ensemble:

            def posterior(weights: Weights) -> sf.Posterior:
                return sf.Posterior(prior, (blueprint,), (weights,), (1.0,), standardiser, like)

            while epoch < epochs and ensemble.running.any():
                ensemble.epoch(jax.random.fold_in(key, epoch))
                self._posterior, epoch = posterior(ensemble.weights(ensemble.latest)), epoch + 1
                watch()
            self._posterior = posterior(ensemble.weights(ensemble.best))
            return epoch, ensemble.held_out.shape[1]
