"""Estimators of different kinds in one posterior, weighted by what they say of held-out rows.

Public names: `Stack`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from sbi_flows.core.typing import Key
from sbi_flows.estimators.npe import NPE
from sbi_flows.estimators.stacking import StackHistory, fit_each
from sbi_flows.posteriors.direct import Posterior
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.simulations import Simulations
from sbi_flows.training.record import of_fit


@dataclasses.dataclass(frozen=True, init=False)
class Stack:
    """A frozen description of estimators whose posteriors are mixed.

    The weights maximise the log density of rows that the models were not trained on: member m of
    every estimator holds out the same rows, and each row is judged by the members that did, with
    the weights of the epoch that was best for the other half of those rows, so that the choice of
    an epoch flatters no estimator. The choice of the linear start, an emulator's own and
    the screening of an observation's entries still look at all of them.

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
            ValueError: There is none, or they differ in prior, members or validation fraction.
        """
        if not estimators or not all(isinstance(e, NPE) for e in estimators):
            raise ValueError(f"estimators: expected one or more sf.NPE, got {estimators!r}")
        priors = [e.prior for e in estimators]
        other = [p for p in priors if not p.matches(priors[0])]
        if other:
            raise ValueError(f"estimators: expected the same prior, got {priors[0]} and {other[0]}")
        for name, values in {
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
            KeyboardInterrupt: Before the first estimator was fitted; later, the rest is left out.
        """
        kept = [e.kept_within(f"estimator-{i}") for i, e in enumerate(self.estimators)]
        # the same key: the same rows are held out
        fits = [partial(e.fit, key, simulations, progress=progress) for e in kept]
        kept, history = fit_each(fits, "estimator", stacklevel=3)
        posterior = dataclasses.replace(
            kept[0][0],
            blueprints=tuple(p.blueprints[0] for p, _ in kept),
            weights=tuple(p.weights[0] for p, _ in kept),
            shares=tuple(share for _, share in kept),
            record=of_fit(self, simulations, history),
        )
        return posterior, history
