"""Estimators of different kinds in one posterior, weighted by what they say of held-out rows.

Public names: `Stack`, `StackHistory`, `stacking_weights`.

Source: Smyth & Wolpert 1998, "Stacked Density Estimation" (NIPS 10); Yao et al. 2018, "Using
Stacking to Average Bayesian Predictive Distributions" (arXiv:1704.02030), eq. 4.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sbi_flows.data import Simulations
from sbi_flows.errors import SbiFlowsWarning, TrainingDiverged
from sbi_flows.estimators.npe import NPE
from sbi_flows.posteriors import Posterior
from sbi_flows.prior import Prior
from sbi_flows.training import History
from sbi_flows.typing import Key

LEAST = 0.01
"""Estimators of a smaller weight are left out of the posterior, and cost nothing there."""


@dataclasses.dataclass(frozen=True, repr=False)
class StackHistory:
    """What happened in the fits of a stack.

    Attributes:
        histories: One an estimator; None for one that diverged.
        shares: Weight of each estimator, shape (K,); zero for those left out.
        held_out_loss: Mean negative log density of the held-out rows under one member of each
            estimator alone, shape (K,), nats; infinite for one that diverged.
        mixture_loss: The same of the mixture.
    """

    histories: tuple[History | None, ...]
    shares: np.ndarray
    held_out_loss: np.ndarray
    mixture_loss: float

    def __repr__(self) -> str:
        """Weights and losses."""
        pairs = zip(self.shares, self.held_out_loss, strict=True)
        said = ", ".join(f"{share:.2f} at {loss:.3f}" for share, loss in pairs)
        return (
            f"StackHistory(shares and held-out losses [{said}]; together {self.mixture_loss:.3f})"
        )


@dataclasses.dataclass(frozen=True, init=False)
class Stack:
    """A frozen description of estimators whose posteriors are mixed.

    The weights maximise the log density of rows that the models were not trained on: member m of
    every estimator holds out the same rows, and each row is judged by the members that did. The
    same rows stopped the training, which flatters every estimator a little.

    Attributes:
        estimators: The estimators, all with the same prior, number of members and validation
            fraction.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = sf.as_prior(dist.Normal(0, 1).expand([2]))
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (2,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 500)
        >>> settings = dict(training=sf.Training(max_epochs=1), members=1)
        >>> kinds = [sf.MAF(transforms=1, hidden=(8,)), sf.GaussianMixture(components=2, width=8)]
        >>> stack = sf.Stack([sf.NPE(prior, kind, **settings) for kind in kinds])
        >>> posterior, history = stack.fit(jax.random.key(1), sims)
        >>> posterior.sample(jax.random.key(2), jax.numpy.zeros(2), 10).shape
        (10, 2)
    """

    estimators: tuple[NPE, ...]

    def __init__(self, estimators: Sequence[NPE]) -> None:
        """Check that the estimators can be compared row by row.

        Raises:
            ValueError: There is none, or they differ in parameters, members or validation fraction.
        """
        if not estimators or not all(isinstance(e, NPE) for e in estimators):
            raise ValueError(f"estimators: expected one or more sf.NPE, got {estimators!r}")
        for name, values in {
            "parameters": {e.prior.labels for e in estimators},
            "members": {e.members for e in estimators},
            "validation_fraction": {e.training.validation_fraction for e in estimators},
        }.items():
            if len(values) > 1:
                raise ValueError(f"estimators: expected the same {name}, got {sorted(values)}")
        object.__setattr__(self, "estimators", tuple(estimators))

    @property
    def prior(self) -> Prior:
        """The prior of all estimators."""
        return self.estimators[0].prior

    @property
    def members(self) -> int:
        """Size of each estimator's ensemble."""
        return self.estimators[0].members

    def fit(
        self, key: Key, simulations: Simulations, *, progress: bool = True
    ) -> tuple[Posterior, StackHistory]:
        """Fit every estimator to the valid rows, then their weights.

        Args:
            key: Random key; the same key and data give the same posterior.
            simulations: Parameters (N, D) inside the prior's support, and observations.
            progress: Show progress bars.

        Returns:
            The mixture and what happened. An estimator that diverged is left out with a warning.

        Raises:
            ValueError: theta does not fit the prior.
            SimulationFailed: Fewer than 10 rows are valid.
            TrainingDiverged: Every estimator diverged.
        """
        done: dict[int, tuple[Posterior, History]] = {}
        for i, estimator in enumerate(self.estimators):
            try:
                # the same key: the same rows are held out
                done[i] = estimator.fit(key, simulations, progress=progress)
            except TrainingDiverged as error:
                if i == len(self.estimators) - 1 and not done:
                    raise
                warnings.warn(
                    f"estimator {i} is left out of the stack: {error}",
                    SbiFlowsWarning,
                    stacklevel=2,
                )
        valid, places = simulations.only_valid(), list(done)
        found = np.stack([_held_out_log_prob(*fit, valid) for fit in done.values()], axis=1)
        weights = _without_small(stacking_weights(found))
        shares, losses = np.zeros(len(self.estimators)), np.full(len(self.estimators), np.inf)
        shares[places], losses[places] = weights, -found.mean(axis=0)
        with np.errstate(divide="ignore"):
            mixed = np.logaddexp.reduce(found + np.log(weights), axis=1)
        histories = tuple(done[i][1] if i in done else None for i in range(len(self.estimators)))
        history = StackHistory(histories, shares, losses, -float(mixed.mean()))
        return _mixture([posterior for posterior, _ in done.values()], weights), history


def stacking_weights(log_density: Any, *, tolerance: float = 1e-6) -> np.ndarray:
    """Weights of a mixture that maximise the mean log density of rows: a convex problem, by EM.

    Args:
        log_density: Log density of each of R rows under each of K models, shape (R, K), nats.
        tolerance: The mean log density is at most this far from the best.

    Returns:
        Weights that are not negative and add up to 1, shape (K,).

    Example:
        >>> import numpy as np
        >>> stacking_weights(np.log([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]])).round(2)
        array([0.71, 0.29])
    """
    log_density = np.asarray(log_density, np.float64)
    best = log_density.max(axis=1, keepdims=True)
    density = np.exp(log_density - np.where(np.isfinite(best), best, 0.0))
    weights = np.full(log_density.shape[1], 1.0 / log_density.shape[1])
    for _ in range(100_000):
        gradient = np.mean(density / np.maximum(density @ weights, 1e-300)[:, None], axis=0)
        # by concavity the optimum is at most this much better
        if np.log(max(gradient.max(), 1.0)) < tolerance:
            break
        weights = weights * gradient
    return weights / weights.sum()


def _without_small(weights: np.ndarray) -> np.ndarray:
    kept = np.where(weights >= min(LEAST, weights.max()), weights, 0.0)
    return kept / kept.sum()


def _held_out_log_prob(posterior: Posterior, history: History, valid: Simulations) -> np.ndarray:
    """Log density of each member's held-out rows under this member alone, shape (M V,)."""
    (stacked,) = posterior.weights
    found = []
    for m, rows in enumerate(history.held_out):
        weights = jax.tree.map(lambda leaf, m=m: leaf[m : m + 1], stacked)
        member = dataclasses.replace(posterior, weights=(weights,))
        part = valid[rows]
        with jax.numpy_rank_promotion("allow"):  # distrax does so in densities
            found.append(np.asarray(member.log_prob(part.theta, part.x), np.float64))
    return np.concatenate(found)


def _mixture(posteriors: list[Posterior], weights: np.ndarray) -> Posterior:
    """One posterior of those whose weight is not zero."""
    kept = [(p, float(w)) for p, w in zip(posteriors, weights, strict=True) if w > 0]
    return dataclasses.replace(
        kept[0][0],
        blueprints=tuple(p.blueprints[0] for p, _ in kept),
        weights=tuple(p.weights[0] for p, _ in kept),
        shares=tuple(w for _, w in kept),
    )
