"""Abstract posterior, and posteriors derived from another one.

Public names: `AbstractPosterior`, `Derived`.

A kind of posterior implements a few private functions over batches of bound observations (see
`bound`). Observations, batches and the warning about atypical data are handled here.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from sbi_flows.artefact.layers import SavedPosterior
from sbi_flows.core.checks import require_count
from sbi_flows.core.typing import Key, Obs
from sbi_flows.observations.misspecification import (
    Anomalies,
    Misspecification,
    require_level,
    test_many,
    test_one,
)
from sbi_flows.observations.standardise import entry_labels
from sbi_flows.observations.typicality import Typicality
from sbi_flows.posteriors.arviz import Groups, arviz_groups, predictive_at
from sbi_flows.posteriors.bound import AtObservation, Bindable
from sbi_flows.posteriors.gate import gate
from sbi_flows.posteriors.writing import save
from sbi_flows.prior.prior import Prior


class AbstractPosterior(Bindable):
    """Posterior of parameters theta (D,) given an observation x (*event).

    One observation has the shape of a training row; a batch has one more axis in front. Batches
    are computed in compiled chunks of bounded memory; results do not depend on the chunks. A
    posterior is a pytree: it passes through `jit`, `grad` and `vmap`, as an argument too. Under a
    trace, shapes are checked and values are not.

    A draw or a density at a single observation warns, once, if that observation is not typical of
    the training simulations at a level of 0.01.

    Attributes:
        prior: The prior, which names the parameters.
        record: Facts about the fit as plain JSON data, read-only: settings, simulations, history,
            versions and, once saved with a report, the check.
        observation: Shape and dtype of one observation (`jax.ShapeDtypeStruct` leaves).
        typicality: Distribution of the training simulations; None where it is not known.
    """

    record: Mapping[str, Any]
    observation: Obs
    typicality: Typicality | None

    @property
    def solved(self) -> bool:
        """Return `needs_ode`; the name in earlier versions."""
        return self.needs_ode

    @property
    @abc.abstractmethod
    def origin(self) -> AbstractPosterior:
        """The posterior that this one was derived from in the first place, or itself."""

    @property
    @abc.abstractmethod
    def has_own_regions(self) -> bool:
        """Whether credible regions are other sets than those of highest density."""

    @abc.abstractmethod
    def credible_levels(self, key: Key, theta: Any, x: Obs) -> np.ndarray:
        """Return the level of the smallest credible region that contains each truth.

        Args:
            key: Random key.
            theta: One parameter vector for each observation, shape (B, D).
            x: A batch (B, *event).

        Returns:
            Values in (0, 1), shape (B,).

        Raises:
            ValueError: The posterior has no regions of its own (`has_own_regions` is False).
        """

    @abc.abstractmethod
    def is_single(self, x: Obs) -> bool:
        """Return whether x is one observation, not a batch; raise ValueError if it is neither."""

    @abc.abstractmethod
    def spaces(self, x: Obs) -> tuple[np.ndarray, ...]:
        """Return features (B, C) and, with an embedding, the output (B, F) of its first member."""

    @abc.abstractmethod
    def _bind(self, x: Obs) -> tuple[Any, bool]:
        """Check x; return what later calls need of it, and whether x was a single observation.

        The first is a pytree of arrays whose leading axis numbers the observations.
        """

    @abc.abstractmethod
    def _features_of(self, bound: Any) -> Array:
        """Return the standardised features (N, C) of all observations in what `_bind` returned."""

    def at(self, x: Obs) -> AtObservation:
        """Bind an observation: check it, standardise it and compare it with the simulations, once.

        Args:
            x: One observation (*event) or a batch (B, *event).

        Returns:
            Pure functions of keys and parameters: `sample`, `log_prob`, `sample_and_log_prob`,
            `map` and, at a single observation, `to_numpyro`.

        Raises:
            ValueError: x has another shape than the training rows, holds no real numbers, or holds
                NaN or infinity.
        """
        bound, single = self._bind(x)
        if single:
            labels = partial(entry_labels, self.observation)
            gate(self.typicality, self._features_of(bound), labels, partial(self.spaces, x))
        return AtObservation(self, bound, single)

    def sample(self, key: Key, x: Obs, n: int) -> Array:
        """Draw from the posterior; no draw is outside the prior's support.

        Args:
            key: Random key.
            x: One observation (*event) or a batch (B, *event).
            n: Number of draws for each observation.

        Returns:
            Shape (n, D), or (B, n, D) for a batch.

        Raises:
            ValueError: x does not fit (see `at`); n is not positive, or more than memory holds; or
                `key` is not a random key.
            SolveFailed: The ODE of a continuous flow was not solved. Under a trace such draws are
                NaN instead.
        """
        return self.at(x).sample(key, n)

    def sample_and_log_prob(self, key: Key, x: Obs, n: int) -> tuple[Array, Array]:
        """Draw as `sample` does, with the log density (n,) or (B, n) of each draw, in nats."""
        return self.at(x).sample_and_log_prob(key, n)

    def log_prob(self, theta: Any, x: Obs) -> Array:
        """Log density in the parameters' own units, in nats; -inf outside the prior's support.

        Args:
            theta: For one observation: shape (*, D). For a batch: (B, D) or (B, n, D), where row b
                belongs to observation b.
            x: One observation (*event) or a batch (B, *event).

        Returns:
            Shape of theta without its last axis.

        Raises:
            ValueError: A shape does not fit, there are no real numbers, or x holds NaN or
                infinity.
            SolveFailed: The ODE of a continuous flow was not solved. Under a trace such densities
                are NaN instead.
        """
        return self.at(x).log_prob(theta)

    def map(self, x: Obs, *, key: Key | None = None, starts: int = 1000, steps: int = 200) -> Array:
        """Mode of the posterior: the best of many draws, refined by gradient ascent.

        Args:
            x: One observation or a batch.
            key: Random key of the draws; a fixed one by default, so that the result is
                deterministic.
            starts: Number of draws.
            steps: Number of steps of Adam.

        Returns:
            Shape (D,), or (B, D) for a batch.

        Raises:
            ValueError: x does not fit, or a number is not positive.
        """
        return self.at(x).map(key=key, starts=starts, steps=steps)

    def to_arviz(
        self,
        key: Key,
        x: Obs,
        *,
        n: int = 4000,
        prior_draws: int = 1000,
        simulator: Any = None,
        predictive_draws: int = 1000,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Any] | None = None,
    ) -> Any:
        """Draws as ArviZ data with named variables.

        Args:
            key: Random key.
            x: One observation.
            n: Number of posterior draws (one chain: they are independent).
            prior_draws: Number of prior draws.
            simulator: The simulator, for the group posterior_predictive; None leaves it out.
            predictive_draws: Number of simulations in that group, at most n.
            coords: Coordinate values by the name of a dimension.
            dims: Names of dimensions by the name of an array parameter or of an array of x.

        Returns:
            `arviz.InferenceData` (ArviZ 0.x) or `xarray.DataTree` (ArviZ 1.x) with the groups
            posterior, sample_stats (`lp`), prior, observed_data and, with a simulator,
            posterior_predictive.

        Raises:
            ValueError: x is a batch or does not fit, a number of draws is not positive, or `dims`
                or `coords` name nothing that is there.
        """
        require_count(1, n=n, prior_draws=prior_draws, predictive_draws=predictive_draws)
        if not self.is_single(x):
            raise ValueError("x: expected one observation, got a batch")
        posterior_key, prior_key = jax.random.split(key)
        draws, log_prob = self.sample_and_log_prob(posterior_key, x, n)
        groups = Groups(draws, log_prob, self.prior.sample(prior_key, prior_draws), x)
        if simulator is not None:
            simulate_key = jax.random.fold_in(key, 2)
            few = draws[:predictive_draws]
            simulated = predictive_at(simulate_key, self.prior, simulator, few)
            groups = groups._replace(simulated=simulated)
        return arviz_groups(self.prior, groups, coords=coords, dims=dims)

    def misspecification(self, x: Obs, *, level: float = 0.05) -> Misspecification | Anomalies:
        """Test whether observations are typical of the training simulations.

        Args:
            x: One observation, or a batch.
            level: Probability of flagging an observation that the simulator made.

        Returns:
            For one observation a `Misspecification`, which says which entries are unusual, prints
            as a table and plots itself; for a batch `Anomalies`, with a p-value for each.

        Raises:
            ValueError: x does not fit, the level is not between 0 and 1, or the posterior does not
                know its training simulations.

        Example:
            >>> import jax, numpyro.distributions as dist, sbi_flows as sf
            >>> prior = dist.Normal(0.0, 1.0).expand([2])
            >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (2,))
            >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 1000, progress=False)
            >>> npe = sf.NPE(prior, sf.MAF(), training=sf.Training(max_epochs=1), members=1)
            >>> posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
            >>> found = posterior.misspecification(jax.numpy.array([0.3, 6.0]))
            >>> found.flagged, found.off
            (True, ('x[1]',))
        """
        require_level(level)
        if self.typicality is None:
            raise ValueError("posterior: expected one that knows its simulations, got none")
        values = self.spaces(x)
        if self.is_single(x) and len(values[0]) == 1:
            return test_one(self.typicality, values, entry_labels(self.observation), level)
        return test_many(self.typicality, values)

    def save(self, path: str | os.PathLike[str], *, report: Any = None) -> None:
        """Write the posterior to one file, which `sf.load` reads; nothing in it is ever executed.

        The file is written as a whole: one of the same name stays until the new one is complete.

        Args:
            path: The file; by custom it ends in `.sbif`.
            report: Result of `sf.check`, which is then kept in `record["check"]`.

        Raises:
            ValueError: A density, network or solver is of the user's own class, the observation has
                other containers than dicts, lists and tuples, or `report` is no report.
            OSError: The file cannot be written.
        """
        save(self, path, report=report)

    @abc.abstractmethod
    def to_saved(self) -> SavedPosterior:
        """Return the content of a file of this posterior.

        Raises:
            ValueError: A part of the posterior cannot be written.
        """


class Derived(AbstractPosterior):
    """Abstract posterior that was derived from another one.

    Attributes:
        posterior: The posterior that it was derived from.
        record: Facts beyond the record of that posterior, as plain JSON data.
    """

    posterior: AbstractPosterior

    @property
    def prior(self) -> Prior:
        """The prior, which names the parameters."""
        return self.posterior.prior

    @property
    def observation(self) -> Obs:
        """Shape and dtype of one observation (`jax.ShapeDtypeStruct` leaves)."""
        return self.posterior.observation

    @property
    def typicality(self) -> Typicality | None:
        """Distribution of the training simulations; None where it is not known."""
        return self.posterior.typicality

    @property
    def needs_ode(self) -> bool:
        """Whether a density is the solution of an ODE: many evaluations of a network."""
        return self.posterior.needs_ode

    @property
    def origin(self) -> AbstractPosterior:
        """The posterior that this one was derived from in the first place."""
        return self.posterior.origin
