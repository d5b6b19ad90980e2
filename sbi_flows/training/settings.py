"""Settings of a fit."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import jax
import optax
from jax import Array

from sbi_flows.core.checks import require_count, require_positive

STEPS = 128
"""Steps of an epoch, at the least, by default."""

SMALLEST, LARGEST = 16, 128
"""Rows of a step by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of a fit.

    Attributes:
        batch_size: Rows a step. By default the power of two from 16 to 128 that makes 128 steps of
            an epoch: few rows take many small steps, or training ends before it has begun.
        max_epochs: Passes over the training rows; also the length of the cosine schedule.
        patience: Epochs without a better validation loss after which a member has stopped; the
            fit ends when all have.
        validation_fraction: Fraction of the rows that each member holds out, in turn: the folds of
            several members do not overlap as long as there are enough rows.
        optimizer: Any optax optimiser, used as it is; by default AdamW with `learning_rate`, a
            warm-up over the first hundredth of the steps and a cosine decay.
        learning_rate: Peak learning rate of the default optimiser; of several, each member takes
            one in turn, all in the same program.
        weight_decay: Weight decay of the default optimiser.
        clip_norm: Largest norm of a gradient.
        ema_decay: Decay of the exponential moving average of the weights, which is what is
            validated and kept; None keeps the weights themselves.
        devices: Most devices to train on; None for all that JAX sees, those of other processes
            included (`jax.distributed`). Members are spread over them first, then the rows of each
            batch.
        matmul_precision: What `jax.default_matmul_precision` takes, for the networks' products in
            training: `"tensorfloat32"` and `"bfloat16"` are meant for large networks where an
            accelerator has units for them, at a loss of accuracy. By default they are in full
            precision, as all products of a trained posterior are; so are those of splines and
            linear layers, whatever is set, and all products on a CPU.
        checkpoint: A folder in which the fit keeps its state, a file for each of the fits that an
            estimator consists of. One that was killed or interrupted and is started again with the
            same call goes on there, and ends with the same weights, bit for bit, on the same kind
            of machine. A fit that ended is not trained again. Other simulations, settings or keys
            than those of the folder are refused. None, the default, keeps nothing.
        checkpoint_every: Epochs from one state that is kept to the next; by default, as many as
            make keeping them cost at most about a hundredth of the fit's time.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> import jax, tempfile, numpyro.distributions as dist, sbi_flows as sf
        >>> noisy = lambda key, theta: theta + jax.random.normal(key)
        >>> sims = sf.simulate(jax.random.key(0), dist.Normal(0, 1), noisy, 100)
        >>> kept = sf.Training(max_epochs=2, checkpoint=tempfile.mkdtemp())
        >>> small = sf.MAF(transforms=1, hidden=(8,))
        >>> npe = sf.NPE(dist.Normal(0, 1), small, training=kept, members=1)
        >>> _, history = npe.fit(jax.random.key(1), sims)
        >>> _, again = npe.fit(jax.random.key(1), sims)  # reads what the first fit left
        >>> bool((history.train_loss == again.train_loss).all())
        True
    """

    batch_size: int | None = None
    max_epochs: int = 20
    patience: int = 8
    validation_fraction: float = 0.1
    optimizer: optax.GradientTransformation | None = None
    learning_rate: float | tuple[float, ...] = 3e-3
    weight_decay: float = 1e-4
    clip_norm: float = 5.0
    ema_decay: float | None = 0.99
    devices: int | None = None
    matmul_precision: str | None = None
    # local: a posterior that is given to others does not say where its fit was kept
    checkpoint: str | os.PathLike[str] | None = dataclasses.field(
        default=None, metadata={"local": True}
    )
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        require_count(1, max_epochs=self.max_epochs)
        if self.batch_size is not None:
            require_count(1, batch_size=self.batch_size)
        require_positive(patience=self.patience, clip_norm=self.clip_norm)
        self._check_rates()
        if self.devices is not None:
            require_count(1, devices=self.devices)
        self._check_precision()
        self._check_checkpoint()
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"weight_decay: expected zero or a positive number, got {self.weight_decay}"
            )
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(
                f"validation_fraction: expected a number in (0, 1), got {self.validation_fraction}"
            )
        if self.ema_decay is not None and not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay: expected None or [0, 1), got {self.ema_decay}")
        if self.optimizer is not None and not hasattr(self.optimizer, "update"):
            raise ValueError(
                f"optimizer: expected one of optax, got {type(self.optimizer).__name__}"
            )

    def _check_rates(self) -> None:
        rates = self.learning_rate
        if not rates and isinstance(rates, tuple):
            raise ValueError("learning_rate: expected one or more numbers, got none")
        for rate in rates if isinstance(rates, tuple) else (rates,):
            require_positive(learning_rate=rate)
            if rate == math.inf:
                raise ValueError(f"learning_rate: expected a positive number, got {rate}")

    def _check_precision(self) -> None:
        try:
            with jax.default_matmul_precision(self.matmul_precision or "default"):
                pass
        except ValueError:
            raise ValueError(
                "matmul_precision: expected what jax.default_matmul_precision takes, such as "
                f"'bfloat16', got {self.matmul_precision!r}"
            ) from None

    def _check_checkpoint(self) -> None:
        path: Any = self.checkpoint
        if path is not None and not isinstance(path, str | os.PathLike):
            raise ValueError(f"checkpoint: expected a folder or None, got {path!r}")
        if path is not None and (not os.fspath(path) or "://" in os.fspath(path)):
            raise ValueError(f"checkpoint: expected a local folder, got {os.fspath(path)!r}")
        if self.checkpoint_every is not None:
            require_count(1, checkpoint_every=self.checkpoint_every)

    @property
    def without_checkpoint(self) -> Training:
        """The same, kept nowhere: what compiled programs depend on."""
        return dataclasses.replace(self, checkpoint=None, checkpoint_every=None)

    def kept_as(self, other: Training, within: str = "") -> Training:
        """The same, kept where the other one is, or in a folder within that."""
        path = other.checkpoint if other.checkpoint is None else Path(other.checkpoint) / within
        every = other.checkpoint_every
        return dataclasses.replace(self, checkpoint=path, checkpoint_every=every)

    def batch(self, rows: int) -> int:
        """Rows a step for a fit to this many.

        Example:
            >>> [Training().batch(rows) for rows in (10, 900, 9_000, 90_000)]
            [10, 16, 64, 128]
        """
        if self.batch_size is not None:
            return min(self.batch_size, rows)
        fitting = 2 ** max(0, int(math.log2(max(1, rows / STEPS))))
        return min(max(fitting, SMALLEST), LARGEST, rows)

    def transform(self, steps: int, rate: float | Array) -> optax.GradientTransformation:
        """The optimiser for a fit of this many steps, gradient clipping included.

        Args:
            steps: Number of steps.
            rate: Peak learning rate of the default optimiser.
        """
        optimizer, clip = self.optimizer, optax.clip_by_global_norm(self.clip_norm)
        if optimizer is None:
            warm_up = max(1, min(100, steps // 100))
            schedule = optax.warmup_cosine_decay_schedule(
                0.0, 1.0, warm_up, max(steps, warm_up + 1), 0.01
            )
            optimizer = optax.adamw(
                lambda step: rate * schedule(step), weight_decay=self.weight_decay
            )
        return optax.chain(clip, optimizer)
