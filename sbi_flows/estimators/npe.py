"""Neural posterior estimation: a conditional density fitted to simulations.

Source: Papamakarios & Murray 2016, "Fast epsilon-free Inference of Simulation Models with Bayesian
Conditional Density Estimation" (arXiv:1605.06376); Greenberg et al. 2019 (arXiv:1905.07488).
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from functools import partial

import jax
import numpy as np
from jax import Array

from sbi_flows.core.checks import require_count, require_fraction, require_positive
from sbi_flows.core.errors import SbiFlowsWarning, SimulationFailed, TrainingDiverged
from sbi_flows.core.typing import Key, Obs
from sbi_flows.densities.base import DensitySettings, check_density
from sbi_flows.densities.conditional import (
    Blueprint,
    Embedding,
    Sizes,
    Weights,
    check_embedding,
)
from sbi_flows.densities.embedded import spaces_of
from sbi_flows.densities.flow import NSF
from sbi_flows.estimators.emulator import Emulator, EmulatorFailed, Seen, emulate
from sbi_flows.estimators.rows import (
    Rows,
    contains,
    joined,
    prepared,
    sample_of,
    standard,
    stream_of,
)
from sbi_flows.estimators.stacking import StackHistory
from sbi_flows.observations.screening import dependent_features
from sbi_flows.observations.standardise import Standardiser, flatten_rows
from sbi_flows.observations.typicality import fit_typicality
from sbi_flows.posteriors.direct import Posterior
from sbi_flows.prior.prior import Prior, PriorLike, as_prior
from sbi_flows.simulations.simulations import Simulations, observation_shape
from sbi_flows.training import History, Training, fit
from sbi_flows.training.record import of_fit

_EMULATED = (
    NSF(hidden=(128, 128), context_width=128, dropout=0.0),
    Training(batch_size=256, max_epochs=12, patience=4),
)
"""Defaults with an emulator: its rows are many and new, so that a large density does not over-fit.
"""


@dataclasses.dataclass(frozen=True, init=False)
class NPE:
    """A frozen description of an amortised posterior estimator.

    Attributes:
        prior: The prior.
        density: The conditional density to fit: `NSF`, the default; `MAF` for posteriors close to a
            Gaussian; `GaussianMixture` for a few parameters; `FlowMatching`, `Diffusion` or `CNF`,
            continuous flows, whose densities are slow.
        training: Settings of the fit; by default `Training()`, with a smaller rate for a `CNF`, and
            with more epochs, more patience and a longer average of the weights for `FlowMatching`
            and `Diffusion`; with an emulator, whose rows are many, a shorter one for any density.
        members: Size of the ensemble; members are trained side by side and mixed.
        embedding: A flax module that maps standardised observations (B, *event) to (B, F), or a
            function `rngs -> module`, with which each member starts from weights of its own.
        emulator: Densities of the observation to fit first, whose draws are trained on as well;
            none by default. With few simulations of a simple noise this is far more accurate.
        screening: Leave out entries of the observation that depend on no parameter, as tests of one
            entry and one parameter at a time say; the expected share of such entries among those
            that are kept, at the most. None, the default, keeps all. An entry that says something
            only together with others is lost, so let a `Stack` judge it beside one that keeps all.

    References:
        Fast epsilon-free Inference of Simulation Models, arXiv:1605.06376.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0, 1).expand([2])
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (2,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 500)
        >>> quick = sf.Training(max_epochs=2)
        >>> posterior, history = sf.NPE(prior, training=quick).fit(jax.random.key(1), sims)
        >>> posterior.sample(jax.random.key(2), jax.numpy.zeros(2), 10).shape
        (10, 2)
    """

    prior: Prior
    density: DensitySettings
    training: Training
    members: int
    embedding: Embedding | None
    emulator: Emulator | None
    screening: float | None

    def __init__(
        self,
        prior: PriorLike,
        density: DensitySettings | None = None,
        *,
        training: Training | None = None,
        members: int = 4,
        embedding: Embedding | None = None,
        emulator: Emulator | None = None,
        screening: float | None = None,
    ) -> None:
        """Validate what is known before any data.

        Raises:
            ValueError: `members` is not positive, the density, the training or the emulator is not
                one, `screening` is not between 0 and 1, or there is an embedding beside it.
        """
        require_count(1, members=members)
        if screening is not None:
            require_positive(screening=screening)
            require_fraction(screening=screening)
            if embedding is not None:
                raise ValueError("screening: expected none with an embedding, got both")
        if emulator is not None and not isinstance(emulator, Emulator):
            raise ValueError(f"emulator: expected sf.Emulator, got {type(emulator).__name__}")
        if density is not None:
            check_density("density", density)
        if embedding is not None:
            check_embedding(embedding)
        if training is not None and not isinstance(training, Training):
            raise ValueError(f"training: expected sf.Training, got {type(training).__name__}")
        default = (NSF(), Training(**getattr(density, "fit_defaults", {})))
        if emulator is not None:
            default = _EMULATED
        fields = {
            "prior": as_prior(prior),
            "density": default[0] if density is None else density,
            "training": default[1] if training is None else training,
            "members": members,
            "embedding": embedding,
            "emulator": emulator,
            "screening": screening,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def fit(
        self, key: Key, simulations: Simulations, *, progress: bool = True
    ) -> tuple[Posterior, History]:
        """Fit to the valid rows of the simulations; changes nothing in place.

        Args:
            key: Random key; the same key and data give the same posterior.
            simulations: Parameters (N, D) inside the prior's support, and observations. Those on
                disk are read while the fit goes on; every member then holds out the same rows.
            progress: Show a progress bar.

        Returns:
            The posterior and the history of the fit.

        Raises:
            ValueError: theta does not fit the prior, or an emulator is asked for observations on
                disk.
            SimulationFailed: Fewer than 10 rows are valid.
            TrainingDiverged: A loss was not finite; `.state` is the last finite posterior.
            CheckpointSpoilt: A file of `Training(checkpoint=...)` is not what was written; those of
                other simulations, keys or settings are a ValueError.
        """
        began = time.perf_counter()
        valid, sample = self._checked(key, simulations)
        rows, standardiser = prepared(self.prior, valid.theta, valid.x)
        like = observation_shape(valid.x)
        kept = self._screened(rows)
        blueprint, features = self._blueprint(like, kept), rows.features

        def posterior(weights: Weights) -> Posterior:
            summarise = partial(spaces_of, blueprint, weights)
            known = fit_typicality(key, summarise, standardiser, features)
            parts = (blueprint,), (weights,), (1.0,)
            return Posterior(self.prior, *parts, standardiser, like, typicality=known)

        stream, emulator_history = None, None
        if sample is not None:
            stream = stream_of(self.prior, blueprint, standardiser, simulations, sample)
        rows = rows._replace(features=blueprint.select_features(rows.features))
        if self.emulator is not None:
            x, own = (
                blueprint.select_features(flatten_rows(valid.x)),
                standardiser.of(blueprint.feature_indices),
            )
            try:
                rows, emulator_history = self._emulated(
                    key, simulations, rows, x, own, progress=progress
                )
            except EmulatorFailed as error:
                said = f"trained without the emulator: {error}"
                warnings.warn(said, SbiFlowsWarning, stacklevel=2)
                return self._without_emulator().fit(key, simulations, progress=progress)
        try:
            weights, history = fit(
                key,
                blueprint,
                self.training,
                rows.y,
                rows.features,
                members=self.members,
                offset=rows.offset,
                own=(len(rows.y) - len(valid)) // self.members,
                stream=stream,
                progress=progress,
            )
        except TrainingDiverged as error:
            error.state = posterior(error.state)  # type: ignore[arg-type]
            raise
        seconds = time.perf_counter() - began
        history = dataclasses.replace(
            history, emulator=emulator_history, kept=kept, seconds=seconds
        )
        record = of_fit(self, simulations, history)
        return dataclasses.replace(posterior(weights), record=record), history

    def _screened(self, rows: Rows) -> tuple[int, ...] | None:
        """Places of the entries of an observation that tell; None if that is not asked, or none."""
        if self.screening is None:
            return None
        kept = np.flatnonzero(dependent_features(rows.y, rows.features, self.screening))
        if not len(kept):
            said = f"no entry of the observation passes screening={self.screening}; all are kept"
            warnings.warn(said, SbiFlowsWarning, stacklevel=3)
            return None
        return tuple(kept.tolist())

    def _blueprint(self, like: Obs, kept: tuple[int, ...] | None) -> Blueprint:
        """What to build for observations like this one, or for some of their entries."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(like))
        sizes = Sizes(self.prior.bounded, jax.tree.structure(like), shapes)
        if kept is None or len(kept) == sizes.feature_count:
            return Blueprint(self.density, self.embedding, sizes)
        sizes = Sizes(self.prior.bounded, jax.tree.structure(0), ((len(kept),),))
        return Blueprint(self.density, None, sizes, kept)

    def _emulated(
        self,
        key: Key,
        simulations: Simulations,
        rows: Rows,
        x: Array,
        standardiser: Standardiser,
        *,
        progress: bool,
    ) -> tuple[Rows, StackHistory]:
        """The rows and, after them, those of an emulator that is fitted to them."""
        assert self.emulator is not None
        places = np.flatnonzero(~np.asarray(simulations.valid))
        failed = rows.y[:0]
        if len(places):
            failed = standard(self.prior, simulations.theta)[places]
        more, history = emulate(
            key,
            self.emulator,
            self.prior,
            Seen(rows.y, x, failed),
            standardiser,
            members=self.members,
            training=self.training,
            progress=progress,
        )
        return joined(self.prior, rows, more), history

    def _without_emulator(self) -> NPE:
        """The same without one; what is at its default becomes the default of such an estimator."""
        density, training = _EMULATED
        plain = NPE(
            self.prior,
            None if self.density == density else self.density,
            members=self.members,
            embedding=self.embedding,
            screening=self.screening,
        )
        default = self.training.without_checkpoint == training
        training = plain.training.kept_as(self.training) if default else self.training
        return dataclasses.replace(plain, training=training)

    def kept_within(self, name: str) -> NPE:
        """The same, with its checkpoint, if there is one, in a folder within."""
        return dataclasses.replace(self, training=self.training.kept_as(self.training, name))

    def _checked(self, key: Key, simulations: Simulations) -> tuple[Simulations, np.ndarray | None]:
        """The valid rows; of those on disk a sample, and which of them these are."""
        if not isinstance(simulations, Simulations):
            raise ValueError(
                f"simulations: expected sf.Simulations, got {type(simulations).__name__}"
            )
        dim = simulations.theta.shape[1]
        if dim != self.prior.dim:
            raise ValueError(
                f"theta: expected {self.prior.dim} columns for {self.prior.labels}, got {dim}"
            )
        outside = int(np.sum(~np.asarray(contains(self.prior, simulations.theta))))
        if outside:
            raise ValueError(
                f"theta: expected values inside the prior's support, got {outside} rows outside"
            )
        if simulations.num_valid < 10:
            raise SimulationFailed(
                "expected at least 10 finite simulations to train on, got "
                f"{simulations.num_valid} of {len(simulations)}"
            )
        if not simulations.on_disk:
            return simulations.only_valid(), None
        if self.emulator is not None:
            raise ValueError("emulator: expected none with observations on disk, got one")
        sample = sample_of(jax.random.fold_in(key, 3), simulations)
        return simulations[np.flatnonzero(simulations.valid)[sample]], sample
