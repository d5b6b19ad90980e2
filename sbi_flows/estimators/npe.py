"""Neural posterior estimation: a conditional density fitted to simulations.

Source: Papamakarios & Murray 2016, "Fast epsilon-free Inference of Simulation Models with Bayesian
Conditional Density Estimation" (arXiv:1605.06376); Greenberg et al. 2019 (arXiv:1905.07488).
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sbi_flows.core.checks import (
    require_count,
    require_fraction,
    require_object,
    require_positive,
)
from sbi_flows.core.errors import SbiFlowsWarning, TrainingDiverged
from sbi_flows.core.typing import Key, Obs
from sbi_flows.core.warn import warn_user
from sbi_flows.densities.base import DensitySettings, check_density
from sbi_flows.densities.conditional import Blueprint
from sbi_flows.densities.embedded import inputs_of_rows, training_inputs
from sbi_flows.densities.embedding import (
    Embedding,
    check_embedding,
    has_summaries_only,
    summary_count,
)
from sbi_flows.densities.flow import NSF
from sbi_flows.densities.sizes import Sizes
from sbi_flows.estimators.emulator import Emulator, EmulatorFailed, Seen, emulate
from sbi_flows.estimators.fit_warnings import outermost_fit, warn_after_fit, warn_before_fit
from sbi_flows.estimators.rows import (
    Problem,
    checked_simulations,
    prepare,
    rows_in_memory,
    screened_entries,
    standard_coordinates,
    stream_of,
    with_emulated,
)
from sbi_flows.estimators.stacking import StackHistory
from sbi_flows.networks.embeddings import EmbeddingSettings
from sbi_flows.observations.missing import MissingPattern
from sbi_flows.observations.shared import SharedAxes
from sbi_flows.observations.standardise import (
    HIDDEN,
    NEVER,
    Standardiser,
)
from sbi_flows.posteriors.direct import Posterior
from sbi_flows.prior.prior import Prior, PriorLike, as_prior
from sbi_flows.simulations.fingerprints import UsedRows
from sbi_flows.simulations.simulations import Simulations, observation_shape
from sbi_flows.training import FitKeys, History, Training, TrainingData, fit
from sbi_flows.training.record import of_fit

_EMULATED = (
    NSF(hidden=(128, 128), context_width=128, dropout=0.0),
    Training(batch_size=256, max_epochs=12, patience=4),
)
"""Default training settings with an emulator: its many rows prevent over-fitting."""


@dataclasses.dataclass(frozen=True, init=False)
class NPE:
    """Settings of neural posterior estimation; `fit` returns an amortised posterior.

    Attributes:
        prior: The prior.
        density: The conditional density to fit. The default is `NSF`. `MAF` suits posteriors close
            to a Gaussian, and `GaussianMixture` suits a few parameters. `FlowMatching`, `Diffusion`
            and `CNF` are continuous flows: evaluating their log densities is slow.
        training: Settings of the fit. The default is `Training()`, with a smaller learning rate for
            a `CNF`, and with more epochs, more patience and a longer average of the weights for
            `FlowMatching` and `Diffusion`. With an emulator there are many rows, so the default is
            a shorter fit for every density.
        members: Number of models in the ensemble. They are trained together, and the posterior is
            their mixture.
        embedding: What reads the observation: settings such as `ConvNet()`, `SeriesNet()` or
            `DeepSet()`, see docs/observations.md; `Summaries(...)`, for fixed summaries without a
            network; or your own flax module, which maps
            standardised observations (B, *event) to (B, F); or a function `rngs -> module`. With
            settings or a function, the members have different initial weights.
        emulator: Settings of an emulator. It learns the density of the observation first, and the
            posterior is then trained on its draws as well. This is far more accurate if there are
            few simulations and their noise is simple. None, the default, uses no emulator.
        screening: Maximum expected fraction of useless entries among the selected entries of the
            observation. An entry is useless if it depends on no parameter; each pair of an entry
            and a parameter is tested separately. The tests miss entries that are informative only
            together with others. To check this, use a `Stack` with an estimator that uses all
            entries. None, the default, selects all entries.
        linear_start: Whether training starts from a linear-Gaussian posterior, which is fitted in
            closed form; otherwise it starts from the prior. If `embedding` is one of this library,
            the linear-Gaussian posterior is conditioned on the fixed summaries of the embedding,
            such as moments.
        missing: Random pattern of missing entries, for example `RandomEntries(0.2)`. The fit hides
            different entries in every batch, and the posterior accepts observations with NaN. With
            None, the fit hides nothing. In both cases, NaN in `Simulations(..., missing=True)`
            marks a missing entry.

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
    linear_start: bool
    missing: MissingPattern | None

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
        linear_start: bool = True,
        missing: MissingPattern | None = None,
    ) -> None:
        """Check the settings.

        Raises:
            ValueError: `members` is not positive; a setting has a wrong type; `screening` is not
                between 0 and 1, or is combined with an embedding; or `missing` is combined with
                `screening` or `emulator`.
        """
        require_count(1, members=members)
        if screening is not None:
            require_positive(screening=screening)
            require_fraction(screening=screening)
            if embedding is not None:
                raise ValueError("screening: expected none with an embedding, got both")
        if missing is not None:
            require_object("missing", missing, MissingPattern, "one such as sf.RandomEntries(0.2)")
            for name, other in {"screening": screening, "emulator": emulator}.items():
                if other is not None:
                    raise ValueError(f"{name}: expected none together with missing=, got one")
        if emulator is not None and not isinstance(emulator, Emulator):
            raise ValueError(f"emulator: expected sf.Emulator, got {type(emulator).__name__}")
        if density is not None:
            check_density("density", density)
        if embedding is not None:
            check_embedding(embedding)
        if training is not None and not isinstance(training, Training):
            raise ValueError(f"training: expected sf.Training, got {type(training).__name__}")
        plain = NSF(), Training(**getattr(density, "fit_defaults", {}))
        default = plain if emulator is None else _EMULATED
        fields = {
            "prior": as_prior(prior),
            "density": default[0] if density is None else density,
            "training": default[1] if training is None else training,
            "members": members,
            "embedding": embedding,
            "emulator": emulator,
            "screening": screening,
            "linear_start": linear_start,
            "missing": missing,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def fit(
        self, key: Key, simulations: Simulations, *, progress: bool = True, summarise: bool = True
    ) -> tuple[Posterior, History]:
        """Fit to the valid rows of the simulations; the estimator itself does not change.

        Args:
            key: Random key; the same key and data give the same posterior.
            simulations: Parameters (N, D) inside the prior's support, and observations.
                Observations on disk are read during the fit; all members then hold out the same
                rows.
            progress: Show a progress bar.
            summarise: Store a description of the training simulations in `posterior.typicality`.
                The posterior uses it to warn about observations unlike the simulations.

        Returns:
            The posterior and the history of the fit.

        Raises:
            ValueError: theta has the wrong shape or lies outside the prior's support; an emulator
                is combined with observations on disk; the simulations have missing entries, and
                there is screening, or an emulator without `Summaries`; the embedding or `missing`
                does not suit the observations; or the checkpoint folder holds a fit with other
                simulations, keys or settings.
            SimulationFailed: Fewer than 10 rows are valid.
            TrainingDiverged: A loss was not finite. The attribute `state` of the exception holds
                the last finite posterior.
            CheckpointSpoilt: A file in the checkpoint folder is damaged.
        """
        with outermost_fit() as is_outermost:
            checked = self._checked(simulations)
            varies = warn_before_fit(self.prior, checked) if is_outermost else True
            posterior, history = self._fit(key, simulations, checked, progress, summarise)
            if is_outermost:
                warn_after_fit(simulations, posterior, history, varies=varies)
        return posterior, history

    def _fit(
        self, key: Key, given: Simulations, checked: Simulations, progress: bool, summarise: bool
    ) -> tuple[Posterior, History]:
        """Fit to `checked`, the given simulations relative to the prior; see `fit`."""
        began = time.perf_counter()
        keys = FitKeys.of(key)
        problem = self._problem(keys, checked)
        data, emulator_history = problem.data, None
        if self.emulator is not None:
            try:
                data, emulator_history = self._emulated(
                    keys, self.emulator, problem, checked, progress=progress
                )
            except EmulatorFailed as error:
                warn_user(f"trained without the emulator: {error}", SbiFlowsWarning)
                plain = self._without_emulator()
                return plain._fit(key, given, checked, progress, summarise)
        rows = UsedRows.of(given, self.prior)
        complete = partial(problem.posterior, self.prior, key if summarise else None, rows)
        blueprint, settings = problem.blueprint, {"members": self.members, "progress": progress}
        try:
            weights, history = fit(keys, blueprint, self.training, data, **settings)
        except TrainingDiverged as error:
            error.state = complete(error.state)  # type: ignore[arg-type]  # a fit left Weights
            raise
        history = dataclasses.replace(
            history,
            emulator=emulator_history,
            kept=problem.screened,
            seconds=time.perf_counter() - began,
        )
        record = of_fit(self, given, history)
        return dataclasses.replace(complete(weights), record=record), history

    @property
    def validation_fraction(self) -> float:
        """Fraction of the rows that each member holds out."""
        return self.training.validation_fraction

    def with_prior(self, prior: PriorLike) -> NPE:
        """Return a copy of the estimator with another prior over the same parameters."""
        return dataclasses.replace(self, prior=prior)

    def with_checkpoint_folder(self, name: str) -> NPE:
        """Return a copy whose checkpoint folder is the subfolder `name` of the present one."""
        training = self.training.with_checkpoint_of(self.training, name)
        return dataclasses.replace(self, training=training)

    def _problem(self, keys: FitKeys, simulations: Simulations) -> Problem:
        """Prepare the rows and the blueprint of a fit."""
        rows, sample = rows_in_memory(keys.sample, simulations)
        observation = observation_shape(rows.x)
        data, standardiser, relative = prepare(
            self.prior,
            rows.theta,
            rows.x,
            self.shared_axes(observation),
            has_missing=simulations.missing or self.missing is not None,
        )
        if self.missing is not None and standardiser.can_miss is not None:
            codes = np.where(self.missing.can_hide(observation), HIDDEN, NEVER).astype(np.uint8)
            codes = jnp.maximum(standardiser.can_miss, codes)
            standardiser = standardiser._replace(can_miss=codes)
        screened = screened_entries(data, self.screening)
        blueprint = self._blueprint(observation, screened, standardiser)
        stream = None
        if sample is not None:
            stream = stream_of(
                self.prior, blueprint, standardiser, simulations, sample, self.training
            )
        selected = dataclasses.replace(
            data, features=training_inputs(blueprint, data.features), stream=stream
        )
        features = data.features
        if self.missing is not None:
            features = inputs_of_rows(blueprint.without_embedding, selected.features, keys.masks)
            hidden = inputs_of_rows(blueprint, features)
            selected = dataclasses.replace(selected, hidden=hidden)
        return Problem(blueprint, standardiser, observation, selected, relative, features, screened)

    def shared_axes(self, observation: Obs) -> SharedAxes | None:
        """Return the axes along which entries share one standardisation; None if there are none.

        Raises:
            ValueError: The embedding, or the pattern of missing entries, does not suit the
                observation.
        """
        if self.missing is not None:
            self.missing.check(observation)
        if not isinstance(self.embedding, EmbeddingSettings):
            return None
        self.embedding.check(observation)
        return self.embedding.shared(observation)

    def _blueprint(
        self, observation: Obs, screened: tuple[int, ...] | None, standardiser: Standardiser
    ) -> Blueprint:
        """Return the description of the model for the observation, or for its screened entries."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(observation))
        bounded, circular = self.prior.bounded, self.prior.circular
        sizes = Sizes(
            bounded,
            jax.tree.structure(observation),
            shapes,
            circular,
            has_mask=standardiser.can_miss is not None,
            summaries=summary_count(self.embedding, observation),
            summaries_only=has_summaries_only(self.embedding),
        )
        if screened is None or len(screened) == sizes.entry_count:
            start = self.linear_start
            return Blueprint(self.density, self.embedding, sizes, None, start, self.missing)
        sizes = Sizes(bounded, jax.tree.structure(0), ((len(screened),),), circular)
        return Blueprint(self.density, None, sizes, screened, self.linear_start)

    def _emulated(
        self,
        keys: FitKeys,
        emulator: Emulator,
        problem: Problem,
        simulations: Simulations,
        *,
        progress: bool,
    ) -> tuple[TrainingData, StackHistory]:
        """Fit an emulator to the rows and append its draws to them."""
        blueprint, data = problem.blueprint, problem.data
        failures = np.flatnonzero(~np.asarray(simulations.valid))
        failed = data.y[:0]
        if len(failures):
            failed = standard_coordinates(self.prior, simulations.theta)[failures]
        x, standardiser = problem.emulator_data
        draws, history = emulate(
            keys,
            emulator,
            self.prior,
            Seen(data.y, x, failed),
            standardiser,
            members=self.members,
            training=self.training,
            progress=progress,
        )
        if blueprint.sizes.summaries and not blueprint.sizes.summaries_only:
            draws = draws._replace(features=inputs_of_rows(blueprint, draws.features))
        return with_emulated(self.prior, data, draws, emulator.simulations), history

    def _without_emulator(self) -> NPE:
        """Return a copy without an emulator.

        The default training settings differ with and without an emulator. Settings that equal the
        defaults with an emulator are replaced by the defaults without. Other settings are kept.
        """
        density, training = _EMULATED
        plain = NPE(
            self.prior,
            None if self.density == density else self.density,
            members=self.members,
            embedding=self.embedding,
            screening=self.screening,
            linear_start=self.linear_start,
        )
        is_default = self.training.without_checkpoint == training
        training = self.training
        if is_default:
            training = plain.training.with_checkpoint_of(self.training)
        return dataclasses.replace(plain, training=training)

    def _checked(self, simulations: Simulations) -> Simulations:
        """Return the simulations relative to the prior; raise ValueError if they are unsuitable."""
        require_object("simulations", simulations, Simulations, "sf.Simulations")
        checked = checked_simulations(self.prior, simulations)
        if checked.missing and self.screening is not None:
            raise ValueError("screening: expected none with missing entries, got one")
        if checked.missing and self.emulator is not None and not has_summaries_only(self.embedding):
            raise ValueError("emulator: with missing entries, expected embedding=sf.Summaries(...)")
        if checked.on_disk and self.emulator is not None:
            raise ValueError("emulator: expected none with observations on disk, got one")
        return checked
