"""This library as a contestant, with the sizes of the recipe or with its defaults.

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
from sbi_flows.densities.conditional import Blueprint, Weights
from sbi_flows.densities.sizes import Sizes
from sbi_flows.observations.standardise import fit_standardiser
from sbi_flows.simulations.simulations import observation_shape
from sbi_flows.training import FitKeys, TrainingData
from sbi_flows.training.ensemble import Ensemble


class Ours:
    """Contestant that uses `sf.NPE` with one ensemble member and a spline flow.

    The flow has no context network and no dropout. The optimiser is Adam with a constant learning
    rate, and the weights are not averaged.

    Args:
        prior: The prior.
        recipe: The sizes.
        defaults: Whether to use the defaults of `sf.NPE` instead of the recipe. The number of steps
            is then summed over the four ensemble members, and the maximum number of epochs is the
            default of `sf.NPE`.
    """

    def __init__(self, prior: sf.Prior, recipe: Recipe, *, defaults: bool = False) -> None:
        """Store the settings and an optimiser. A new one in each fit would cause recompilation."""
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
        clip_norm = float("inf") if recipe.clip_norm is None else recipe.clip_norm
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(clip_norm), optax.adam(recipe.learning_rate)
        )
        self._posterior: sf.Posterior | None = None

    def describe(self) -> dict[str, Any]:
        """Describe the density, the coordinates and the number of parameters."""
        npe, params = self._npe(1, 1), self._fitted.weights[0].params
        return {
            "density": repr(npe.density),
            "members": npe.members,
            "coordinates": "the prior's standard ones, whitened by the linear-Gaussian start",
            "validation": "all validation rows; the best weights are kept",
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
        """Call `NPE.fit`. With `watch`, train the ensemble epoch by epoch instead."""
        key = jax.random.key(seed)
        if watch is None:
            npe = self._npe(epochs, patience)
            posterior, history = npe.fit(key, sf.Simulations(theta, x), progress=False)
            jax.block_until_ready(posterior.weights)
            self._posterior = posterior
            num_epochs, held_out = history.epochs, history.held_out.shape[1]
        else:
            x = jax.tree.map(jnp.asarray, x)
            # the learning rate is constant, so one compiled program works for any number of epochs
            npe = sf.NPE(self._prior) if self._defaults else self._npe(1, patience)
            epochs = min(epochs, npe.training.max_epochs) if self._defaults else epochs
            num_epochs, held_out = self._watched(npe, key, jnp.asarray(theta), x, epochs, watch)
        rows = len(theta) - held_out
        return Fit(num_epochs, npe.members * num_epochs * (rows // npe.training.batch(rows)))

    def sample(self, x: Obs, n: int, *, seed: int) -> np.ndarray:
        """Call `Posterior.sample`."""
        return np.asarray(self._fitted.sample(jax.random.key(seed), x, n))

    def log_prob(self, theta: np.ndarray, x: Obs) -> np.ndarray:
        """Call `Posterior.log_prob`."""
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
            ema_decay=None,
        )
        return sf.NPE(self._prior, self._density, training=training, members=1)

    def _watched(
        self, npe: sf.NPE, key: jax.Array, theta: jax.Array, x: Obs, epochs: int, watch: Watch
    ) -> tuple[int, int]:
        """Fit with a callback per epoch; return the numbers of epochs and of validation rows."""
        prior, shape = self._prior, observation_shape(x)
        y, standardiser = prior.to_standard(theta), fit_standardiser(x)
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(shape))
        sizes = Sizes(prior.bounded, jax.tree.structure(shape), shapes)
        blueprint = Blueprint(npe.density, None, sizes)
        offset, epoch = prior.standard_log_det(y, theta), 0
        data, keys = TrainingData(y, standardiser(x), offset), FitKeys.of(key)
        with Ensemble(keys, blueprint, npe.training, data, npe.members) as ensemble:

            def posterior(weights: Weights) -> sf.Posterior:
                return sf.Posterior(prior, (blueprint,), (weights,), (1.0,), standardiser, shape)

            while epoch < epochs and ensemble.running.any():
                ensemble.epoch(jax.random.fold_in(key, epoch))
                self._posterior, epoch = posterior(ensemble.weights(ensemble.latest)), epoch + 1
                watch()
            self._posterior = posterior(ensemble.weights(ensemble.best))
            return epoch, ensemble.held_out.shape[1]
