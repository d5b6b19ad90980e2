"""Abstract posterior, and posteriors derived from another one.

Public names: `AbstractPosterior`.

A class of posteriors implements a few private methods for batches of bound observations (see
`bound`). The base class checks observations, handles batches and warns about atypical data.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from sbi_flows.artefact.layers import SavedPosterior
from sbi_flows.core.checks import require_count
from sbi_flows.core.typing import Key, Obs
from sbi_flows.observations.batches import Missing
from sbi_flows.observations.misspecification import (
    Anomalies,
    Misspecification,
    require_level,
    test_many,
    test_one,
)
from sbi_flows.observations.typicality import Typicality
from sbi_flows.posteriors.arviz import Groups, arviz_groups, require_chains
from sbi_flows.posteriors.bound import AtObservation, Bindable
from sbi_flows.posteriors.gate import gate
from sbi_flows.posteriors.writing import save
from sbi_flows.simulations.fingerprints import UsedRows
from sbi_flows.simulations.simulate import simulate_at


class AbstractPosterior(Bindable):
    """Posterior of parameters theta (D,) given an observation x (*event).

    One observation has the shape of a training row; a batch has one more axis in front. Batches
    are computed in compiled chunks, which limits the memory; results do not depend on the chunks. A
    posterior is a pytree: use it inside `jit`, `grad` and `vmap`, or pass it to them as an
    argument. Inside these transformations, shapes are checked and values are not.

    When draws or densities are computed at a single observation, a warning is issued once if that
    observation is not typical of the training simulations at a level of 0.01.

    Attributes:
        prior: Prior of the parameters; it defines their names.
        record: Facts about the fit as plain JSON data, read-only: settings, simulations, history,
            versions and, if the posterior was saved with a report, the check.
        observation: Shape and dtype of one observation (`jax.ShapeDtypeStruct` leaves).
        typicality: Distribution of the training simulations; None if it is not known.
        used_rows: Fingerprints of the simulations that the fit and the corrections used; None if
            they are not known.
    """

    record: Mapping[str, Any]
    observation: Obs
    typicality: Typicality | None
    used_rows: UsedRows | None

    @property
    def solved(self) -> bool:
        """Return `needs_ode`, which was called `solved` in earlier versions."""
        return self.needs_ode

    @property
    def columns(self) -> Sequence[str] | None:
        """Names of the columns of the training observations, if they were given as a table."""
        simulations = self.origin.record.get("simulations")
        columns = simulations.get("columns") if isinstance(simulations, Mapping) else None
        # the record of a file may hold anything
        if not isinstance(columns, list | tuple) or not all(isinstance(c, str) for c in columns):
            return None
        return tuple(columns)

    @property
    @abc.abstractmethod
    def origin(self) -> AbstractPosterior:
        """Posterior from which this one was derived in one or more steps; itself if not derived."""

    @property
    @abc.abstractmethod
    def has_own_regions(self) -> bool:
        """Whether `credible_levels` uses regions other than those of highest density."""

    @abc.abstractmethod
    def credible_levels(self, key: Key, theta: Any, x: Obs) -> np.ndarray:
        """Return the level of the smallest credible region that contains each true theta.

        Args:
            key: Random key.
            theta: The true parameter vector of each observation, shape (B, D).
            x: A batch (B, *event).

        Returns:
            Levels in (0, 1), shape (B,).

        Raises:
            ValueError: `has_own_regions` is False.
        """

    @abc.abstractmethod
    def is_single(self, x: Obs) -> bool:
        """Return whether x is one observation, not a batch; raise ValueError if it is neither."""

    @abc.abstractmethod
    def spaces(self, x: Obs) -> tuple[np.ndarray, ...]:
        """Return features (B, C) and, if an embedding has a network, its output (B, F).

        Missing entries are zero. For an embedding with fixed summaries, the summaries (B, K) take
        the place of the features.

        If the members have different embeddings, the output is computed by the embedding of
        the first member.
        """

    @property
    @abc.abstractmethod
    def space_labels(self) -> tuple[str, ...]:
        """Names of the columns of the first array of `spaces`."""

    @abc.abstractmethod
    def present_fraction(self, x: Obs) -> np.ndarray | None:
        """Return the fraction of entries that each observation has, shape (B,).

        The result is None if observations must be complete.
        """

    @property
    @abc.abstractmethod
    def missing(self) -> Missing:
        """Entries that an observation may lack."""

    @abc.abstractmethod
    def _bind(self, x: Obs) -> tuple[Any, bool]:
        """Check x and prepare it for later calls.

        Returns:
            A pytree of arrays with a leading axis of B observations, and whether x was a single
            observation (then B = 1).
        """

    @abc.abstractmethod
    def _features_of(self, bound: Any) -> Array:
        """Return the standardised features (N, C) of all observations in `bound`, from `_bind`."""

    def at(self, x: Obs) -> AtObservation:
        """Bind the posterior to x: check, standardise and compare x with the simulations once.

        Args:
            x: One observation (*event) or a batch (B, *event).

        Returns:
            An object with the methods `sample`, `log_prob`, `sample_and_log_prob`, `map` and, for a
            single observation, `to_numpyro`. They are pure functions of keys and parameters.

        Raises:
            ValueError: The shape of x differs from that of a training row, or x contains infinity
                or entries that are not real numbers, or NaN where no entry may be missing.
        """
        bound, single = self._bind(x)
        if single:
            values = partial(self._compared, x)
            features = self._features_of(bound)
            gate(self.typicality, features, lambda: self.space_labels, values)
        return AtObservation(self, bound, single)

    def sample(self, key: Key, x: Obs, n: int) -> Array | np.ndarray:
        """Draw from the posterior; all draws are inside the prior's support.

        Args:
            key: Random key.
            x: One observation (*event) or a batch (B, *event).
            n: Number of draws for each observation.

        Returns:
            Draws, shape (n, D), or (B, n, D) for a batch.

        Raises:
            ValueError: x is invalid (see `at`); n is not positive; the draws do not fit in memory;
                or `key` is not a random key.
            SolveFailed: The ODE of a continuous flow was not solved. Inside a transformation such
                as `jit` these draws are NaN instead.
        """
        return self.at(x).sample(key, n)

    def sample_and_log_prob(self, key: Key, x: Obs, n: int) -> tuple[Array | np.ndarray, Array]:
        """Draw like `sample`; also return log densities (n,) or (B, n) of the draws, in nats."""
        return self.at(x).sample_and_log_prob(key, n)

    def log_prob(self, theta: Any, x: Obs) -> Array:
        """Compute the log density of theta, in nats; it is -inf outside the prior's support.

        The density is per unit of the parameters, not of standard coordinates.

        Args:
            theta: For one observation: shape (*, D). For a batch: shape (B, D) or (B, n, D), where
                theta[b] belongs to observation b.
            x: One observation (*event) or a batch (B, *event).

        Returns:
            Log densities, with the shape of theta without its last axis.

        Raises:
            ValueError: x is invalid (see `at`), theta has a wrong shape, or theta has entries that
                are not real numbers.
            SolveFailed: The ODE of a continuous flow was not solved. Inside a transformation such
                as `jit` these densities are NaN instead.
        """
        return self.at(x).log_prob(theta)

    def map(
        self, x: Obs, *, key: Key | None = None, starts: int = 1000, steps: int = 200
    ) -> Array | np.ndarray:
        """Find the mode of the posterior: refine the best of many draws by gradient ascent.

        Args:
            x: One observation or a batch.
            key: Random key for the draws. The default is a fixed key, so that repeated calls give
                the same result.
            starts: Number of draws.
            steps: Number of steps of Adam.

        Returns:
            Mode, shape (D,), or (B, D) for a batch.

        Raises:
            ValueError: x is invalid (see `at`), or `starts` or `steps` is not positive.
        """
        return self.at(x).map(key=key, starts=starts, steps=steps)

    def to_arviz(
        self,
        key: Key,
        x: Obs,
        *,
        n: int = 4000,
        chains: int = 4,
        prior_draws: int = 1000,
        simulator: Any = None,
        predictive_draws: int = 1000,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Any] | None = None,
    ) -> Any:
        """Draw from the posterior and the prior, and return ArviZ data with named variables.

        Args:
            key: Random key.
            x: One observation.
            n: Number of posterior draws, a multiple of `chains`.
            chains: Number of chains. The draws are independent; ArviZ compares chains to compute
                R-hat and effective sample sizes.
            prior_draws: Number of prior draws, in one chain.
            simulator: The simulator, for the group posterior_predictive; if None, the group is left
                out. Draw d of chain c is a simulation at draw d of chain c of the posterior.
            predictive_draws: Number of simulations in the group posterior_predictive: at most n,
                and rounded down to a multiple of `chains`. Draws whose simulation failed are left
                out of this group, and up to `chains` - 1 others.
            coords: Coordinate values by the name of a dimension.
            dims: Names of dimensions by the name of an array parameter or of an array of x.

        Returns:
            `arviz.InferenceData` (ArviZ 0.x) or `xarray.DataTree` (ArviZ 1.x) with the groups
            posterior, sample_stats (`lp`), prior, observed_data and, with a simulator,
            posterior_predictive. Variables are in the order of the prior.

        Raises:
            ValueError: x is a batch or is invalid (see `at`), a number of draws is not positive, n
                is not a multiple of `chains`, `predictive_draws` is smaller than `chains`, or
                `dims` or `coords` does not match the variables.
            SimulationFailed: Fewer simulations than chains are valid.
        """
        require_count(1, n=n, prior_draws=prior_draws)
        require_chains(n, chains)
        require_count(1 if simulator is None else chains, predictive_draws=predictive_draws)
        if not self.is_single(x):
            raise ValueError("x: expected one observation, got a batch")
        posterior_key, prior_key = jax.random.split(key)
        draws, log_prob = self.sample_and_log_prob(posterior_key, x, n)
        # the draws of the members alternate: each chain must have draws of all members
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 3), n))
        draws, log_prob = draws[order], log_prob[order]
        groups = Groups(draws, log_prob, self.prior.sample(prior_key, prior_draws), x)
        if simulator is not None:
            simulate_key = jax.random.fold_in(key, 2)
            few = draws[: predictive_draws // chains * chains]
            missing = self.missing.simulates_gaps
            simulated = simulate_at(
                simulate_key, self.prior, simulator, few, missing=missing, progress=False
            )
            groups = groups._replace(simulated=simulated)
        return arviz_groups(self.prior, groups, chains=chains, coords=coords, dims=dims)

    def misspecification(self, x: Obs, *, level: float = 0.05) -> Misspecification | Anomalies:
        """Test whether each observation is typical of the training simulations.

        Args:
            x: One observation, or a batch.
            level: Probability of flagging an observation that comes from the simulator.

        Returns:
            For one observation, a `Misspecification`: it lists the unusual entries, prints a table
            and has a method `plot`. For a batch, `Anomalies` with a p-value for each observation.

        Raises:
            ValueError: x is invalid (see `at`), the level is not between 0 and 1, or `typicality`
                is None.

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
        values, present = self._compared(x)
        if self.is_single(x) and len(values[0]) == 1:
            typicality = self.typicality if present is None else self.typicality.given(present[0])
            return test_one(typicality, values, self.space_labels, level)
        return test_many(self.typicality, values, present)

    def _compared(self, x: Obs) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
        """Return what observations are compared by: their spaces, and how much they have."""
        return self.spaces(x), self.present_fraction(x)

    def save(self, path: str | os.PathLike[str], *, report: Any = None) -> None:
        """Write the posterior to one file, which `sf.load` reads. The file contains no code.

        An existing file of the same name is replaced only when the new file is complete.

        Args:
            path: Path of the file; the usual ending is `.sbif`.
            report: Result of `sf.check`, to be saved in `record["check"]`.

        Raises:
            ValueError: The class of a density, network or solver is not part of this library; the
                observation has containers other than dicts, lists and tuples; or `report` is not a
                report.
            OSError: The file cannot be written.
        """
        save(self, path, report=report)

    @abc.abstractmethod
    def to_saved(self) -> SavedPosterior:
        """Return the data that `save` writes to the file.

        Raises:
            ValueError: A part of the posterior cannot be saved.
        """
