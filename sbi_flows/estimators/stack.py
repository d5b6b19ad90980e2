"""A mixture of the posteriors of several estimators, weighted on held-out rows.

Public names: `Stack`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import jax
import numpy as np

from sbi_flows.core.checks import require_object
from sbi_flows.core.typing import Key
from sbi_flows.estimators.base import Estimator
from sbi_flows.estimators.fit_warnings import outermost_fit, warn_after_fit, warn_before_fit
from sbi_flows.estimators.npe import NPE
from sbi_flows.estimators.rows import rows_in_memory, summarised
from sbi_flows.estimators.stacking import StackHistory, fit_each
from sbi_flows.observations.standardise import features_of
from sbi_flows.posteriors.direct import Posterior
from sbi_flows.posteriors.fresh import hidden_as_in_fit
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.fingerprints import UsedRows
from sbi_flows.simulations.simulations import Simulations, observation_shape
from sbi_flows.training import FitKeys
from sbi_flows.training.record import of_fit


@dataclasses.dataclass(frozen=True, init=False)
class Stack:
    """Settings of a stack: estimators whose posteriors are mixed.

    The mixture weights maximise the log density of held-out rows. Member m of every estimator holds
    out the same rows. The members that held out a row evaluate it. They use the network weights of
    the epoch that was best for the other half of the held-out rows, so that the choice of the epoch
    does not favour an estimator. Three choices still depend on all rows: the linear start, the
    weights of an emulator, and the screening of the observation's entries.

    Attributes:
        estimators: The estimators, all with the same prior, number of members and validation
            fraction. Each is an `NPE`, a `Stack`, or an instance of another class that implements
            `sbi_flows.estimators.base.Estimator`.

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

    estimators: tuple[Estimator, ...]

    def __init__(self, estimators: Sequence[Estimator]) -> None:
        """Check that the estimators can be compared row by row.

        Raises:
            ValueError: `estimators` is empty, one of them is not an estimator, or they differ in
                prior, members or validation fraction.
        """
        if not estimators or not all(map(_is_estimator, estimators)):
            raise ValueError(
                f"estimators: expected one or more estimators such as sf.NPE, got {estimators!r}"
            )
        priors = [e.prior for e in estimators]
        others = [p for p in priors if not p.matches(priors[0])]
        if others:
            raise ValueError(
                f"estimators: expected the same prior, got {priors[0]} and {others[0]}"
            )
        for name, values in {
            "members": {e.members for e in estimators},
            "validation_fraction": {e.validation_fraction for e in estimators},
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
        """Number of models in each estimator's ensemble."""
        return self.estimators[0].members

    @property
    def validation_fraction(self) -> float:
        """Fraction of the rows that each member holds out."""
        return self.estimators[0].validation_fraction

    def with_prior(self, prior: Prior) -> Stack:
        """Return a copy of the stack with another prior over the same parameters."""
        return Stack([e.with_prior(prior) for e in self.estimators])

    def with_checkpoint_folder(self, name: str) -> Stack:
        """Return a copy of the stack with checkpoints in the subfolder `name` of each folder."""
        return Stack([e.with_checkpoint_folder(name) for e in self.estimators])

    def fit(
        self, key: Key, simulations: Simulations, *, progress: bool = True, summarise: bool = True
    ) -> tuple[Posterior, StackHistory]:
        """Fit every estimator to the valid rows, then fit the mixture weights.

        Args:
            key: Random key; the same key and data give the same posterior.
            simulations: Parameters (N, D) inside the prior's support, and observations.
            progress: Show progress bars.
            summarise: Store a description of the training simulations in `posterior.typicality`.
                The posterior uses it to warn about observations unlike the simulations.

        Returns:
            The mixture of the posteriors, and the history of the fits. An estimator whose fit
            diverged is left out, with a warning.

        Raises:
            ValueError: theta has the wrong shape or lies outside the prior's support, or the
                estimators' posteriors cannot be mixed.
            SimulationFailed: Fewer than 10 rows are valid.
            TrainingDiverged: Every estimator diverged.
            KeyboardInterrupt: The fit was interrupted before the first estimator was fitted. After
                a later interrupt, the mixture consists of the estimators fitted so far.
        """
        require_object("simulations", simulations, Simulations, "sf.Simulations")
        self._require_one_standardiser(simulations)
        with outermost_fit() as is_outermost:
            varies = warn_before_fit(self.prior, simulations) if is_outermost else True
            posterior, history = self._fit(key, simulations, progress, summarise)
            if is_outermost:
                warn_after_fit(simulations, posterior, history, varies=varies)
        return posterior, history

    def _require_one_standardiser(self, simulations: Simulations) -> None:
        """Raise ValueError if estimators would standardise or hide the observations differently.

        Posteriors of a mixture share one standardiser.
        """
        like = observation_shape(simulations.x)
        alone = [e for e in self.estimators if isinstance(e, NPE)]
        axes = {e.shared_axes(like) or tuple(() for _ in jax.tree.leaves(like)) for e in alone}
        if len(axes) > 1:
            raise ValueError(
                "estimators: expected embeddings that standardise the same axes together, got "
                f"{sorted(axes)}; give all estimators an embedding of the same kind"
            )
        patterns = {e.missing for e in alone}
        if len(patterns) > 1:
            raise ValueError(f"estimators: expected the same missing=, got {patterns}")

    def _fit(
        self, key: Key, simulations: Simulations, progress: bool, summarise: bool
    ) -> tuple[Posterior, StackHistory]:
        """Fit like `fit`, without its warnings."""
        # the same key, so that the same rows are held out
        fits = [
            partial(
                e.with_checkpoint_folder(f"estimator-{i}").fit,
                key,
                simulations,
                progress=progress,
                summarise=False,
            )
            for i, e in enumerate(self.estimators)
        ]
        parts, history = fit_each(fits, "estimator")
        posterior = _mixture(parts)
        if summarise:
            rows, _ = rows_in_memory(FitKeys.of(key).sample, simulations)
            rows = hidden_as_in_fit(key, posterior, rows)
            features = features_of(posterior.standardiser, rows.x)
            posterior = summarised(key, posterior, features)
        record = of_fit(self, simulations, history)
        return dataclasses.replace(posterior, record=record), history


def _is_estimator(value: Any) -> bool:
    return isinstance(value, Estimator) and not isinstance(value, type)


def _mixture(parts: list[tuple[Posterior, float]]) -> Posterior:
    """Return the mixture of posteriors, each given with its weight.

    Raises:
        ValueError: A part is not an `sf.Posterior`, or the parts have different standardisers.
    """
    first = parts[0][0]
    for posterior, _ in parts:
        if not isinstance(posterior, Posterior):
            raise ValueError(
                "estimators: expected estimators that fit an sf.Posterior, got "
                f"{type(posterior).__name__}"
            )
        if not _is_equal(posterior.standardiser, first.standardiser):
            raise ValueError(
                "estimators: expected posteriors with the same standardiser, got different ones"
            )
    return dataclasses.replace(
        first,
        used_rows=reduce(_union, [p.used_rows for p, _ in parts]),
        blueprints=tuple(b for p, _ in parts for b in p.blueprints),
        weights=tuple(w for p, _ in parts for w in p.weights),
        shares=tuple(share * s for p, share in parts for s in p.shares),
    )


def _union(a: UsedRows | None, b: UsedRows | None) -> UsedRows | None:
    return b if a is None else a.union(b)


def _is_equal(a: Any, b: Any) -> bool:
    same = jax.tree.structure(a) == jax.tree.structure(b)
    return same and all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
