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

MIN_EPOCH_STEPS = 128
"""Minimum number of steps in an epoch with the default batch size, if there are enough rows."""

MIN_BATCH_SIZE, MAX_BATCH_SIZE = 16, 128
"""Minimum and maximum of the default batch size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of a fit.

    Attributes:
        batch_size: Number of rows in a batch. The default is the largest power of two from 16 to
            128 that gives at least 128 steps in an epoch, and 16 for smaller data sets.
        max_epochs: Maximum number of epochs (passes over the training rows). The cosine decay of
            the learning rate ends after this number of epochs.
        patience: Number of epochs without a lower validation loss after which a member stops. The
            fit ends when all members have stopped.
        validation_fraction: Fraction of the rows that each member holds out for validation. Members
            hold out different rows as long as there are enough rows.
        optimizer: An optax optimiser. It is used unchanged; to clip gradients, include
            `optax.clip_by_global_norm` in it. The default is AdamW with `learning_rate`,
            `weight_decay` and `clip_norm`, a warm-up over the first 1 % of the steps (at most 100
            steps) and a cosine decay.
        learning_rate: Peak learning rate of the default optimiser. If it is a tuple, member i uses
            entry i; if there are more members than entries, the tuple is repeated.
        weight_decay: Weight decay of the default optimiser.
        clip_norm: Maximum global norm of the gradients in the default optimiser. Larger gradients
            are scaled down to this norm.
        ema_decay: Decay of the exponential moving average of the weights. The averaged weights are
            validated and become the result. With None, the weights are not averaged.
        devices: Maximum number of devices for training. None uses all devices of JAX, including
            devices of other processes (`jax.distributed`). Members are distributed over the devices
            first, then the rows of each batch.
        matmul_precision: Precision of the networks' matrix products in training, a value for
            `jax.default_matmul_precision`. `"tensorfloat32"` and `"bfloat16"` are faster, but less
            accurate, for large networks on accelerators that support them. The default is full
            precision. Splines, linear layers, trained posteriors and CPUs always use full
            precision.
        checkpoint: Folder in which the fit saves its state. An estimator that runs several fits
            writes one file for each. If a fit was killed or interrupted, the same call continues it
            and gives the same weights, bit for bit, on the same kind of machine. The result of a
            finished fit is read from the folder. If simulations, settings or keys differ from those
            of the saved fit, ValueError is raised. None, the default, saves nothing.
        checkpoint_every: Number of epochs between two saved states. The default is chosen such that
            saving takes at most about 1 % of the time of the fit.

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
    # local: this field is not saved with a posterior, because it names a folder of the user
    checkpoint: str | os.PathLike[str] | None = dataclasses.field(
        default=None, metadata={"local": True}
    )
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is out of range."""
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
                f"optimizer: expected an optax optimiser, got {type(self.optimizer).__name__}"
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
        """The settings without a checkpoint. Compiled programs use these settings."""
        return dataclasses.replace(self, checkpoint=None, checkpoint_every=None)

    def with_checkpoint_of(self, other: Training, folder: str = "") -> Training:
        """Return the settings with the checkpoint settings of `other`.

        Args:
            other: Settings whose `checkpoint` and `checkpoint_every` are used.
            folder: Subfolder of the checkpoint folder; empty for the checkpoint folder itself.
        """
        path = other.checkpoint if other.checkpoint is None else Path(other.checkpoint) / folder
        every = other.checkpoint_every
        return dataclasses.replace(self, checkpoint=path, checkpoint_every=every)

    def batch(self, rows: int) -> int:
        """Return the batch size for `rows` training rows.

        Example:
            >>> [Training().batch(rows) for rows in (10, 900, 9_000, 90_000)]
            [10, 16, 64, 128]
        """
        if self.batch_size is not None:
            return min(self.batch_size, rows)
        default = 2 ** max(0, int(math.log2(max(1, rows / MIN_EPOCH_STEPS))))
        return min(max(default, MIN_BATCH_SIZE), MAX_BATCH_SIZE, rows)

    def transform(self, steps: int, learning_rate: float | Array) -> optax.GradientTransformation:
        """Return the user's optimiser unchanged, or make the default optimiser.

        Args:
            steps: Number of steps of the fit, for the schedule of the learning rate.
            learning_rate: Peak learning rate of the default optimiser.
        """
        if self.optimizer is not None:
            return self.optimizer
        warm_up = max(1, min(100, steps // 100))
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, 1.0, warm_up, max(steps, warm_up + 1), 0.01
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                lambda step: learning_rate * schedule(step), weight_decay=self.weight_decay
            ),
        )
