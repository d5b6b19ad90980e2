"""Estimator whose observations a frozen network encodes.

Public names: `Encoded`.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from sbi_flows.core.checks import require_object
from sbi_flows.core.typing import Key
from sbi_flows.densities.encoder import (
    Encoder,
    Network,
    check_network,
    encoded_rows,
    takes_mask,
)
from sbi_flows.estimators.base import Estimator, FitHistory
from sbi_flows.observations.standardise import rows_on_host
from sbi_flows.posteriors.encoded import EncodedPosterior
from sbi_flows.simulations.fingerprints import UsedRows
from sbi_flows.simulations.simulations import Simulations, observation_shape

_BLOCK_ROWS = 4096
"""Number of rows in which missing entries are looked for at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Estimator with a frozen network: it encodes each observation once, before the fit.

    Use it for a network that was trained elsewhere, for example on many images or on a regression.
    The fit then sees codes in place of observations, and costs as little as a fit to F summary
    statistics. An `embedding` of `NPE`, in contrast, is trained together with the density.

    Attributes:
        estimator: `NPE` or `Stack`, for observations (F,).
        network: Trained flax module, or JAX function, from observations (B, *event) in the user's
            units to codes (B, F). Modules with BatchNorm or Dropout must be set to evaluation by
            `network.eval()`. If observations lack entries, it must have an argument `mask`: for
            each array, True where an entry is present. Missing entries of x are then zero.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0.0, 1.0).expand([1])
        >>> image = lambda key, theta: theta + jax.random.normal(key, (4, 4))
        >>> sims = sf.simulate(jax.random.key(0), prior, image, 200, progress=False)
        >>> npe = sf.NPE(prior, sf.MAF(), training=sf.Training(max_epochs=1), members=1)
        >>> encoded = sf.Encoded(npe, lambda x: x.mean(axis=(1, 2))[:, None])
        >>> posterior, history = encoded.fit(jax.random.key(1), sims, progress=False)
        >>> posterior.sample(jax.random.key(2), jnp.zeros((4, 4)), 10).shape
        (10, 1)
    """

    estimator: Estimator
    network: Network

    def __post_init__(self) -> None:
        """Raise ValueError if the estimator or the network is unsuitable."""
        require_object("estimator", self.estimator, Estimator, "an estimator, such as sf.NPE")
        check_network(self.network)

    def fit(
        self, key: Key, simulations: Simulations, *, progress: bool = True
    ) -> tuple[EncodedPosterior, FitHistory]:
        """Encode the observations, and fit the estimator to the codes.

        Args:
            key: Random key of the fit.
            simulations: Parameters (N, D) and observations, in memory or on disk.
            progress: Show progress bars.

        Returns:
            The posterior given observations before the encoding, and the history of the fit.

        Raises:
            ValueError: The network has no argument `mask` although entries are missing; it returns
                no array (B, F), or codes that are not finite; or the code of an observation depends
                on the other observations of a batch. See also `NPE.fit`.
        """
        require_object("simulations", simulations, Simulations, "sf.Simulations")
        has_mask = simulations.missing
        if has_mask and not takes_mask(self.network):
            raise ValueError(
                "network: expected an argument `mask`, True where an entry is present, because "
                "entries are missing"
            )
        encoder = Encoder.of(self.network)
        valid = np.flatnonzero(simulations.valid)
        used = simulations[valid] if len(valid) < len(simulations) else simulations
        codes = encoded_rows(encoder, used.x, has_mask=has_mask, progress=progress)
        if not np.all(np.isfinite(codes)):
            count = int(np.sum(~np.isfinite(codes).all(axis=1)))
            raise ValueError(f"network: expected finite codes, got {count} rows with others")
        theta = used.aligned(self.estimator.prior).theta
        coded = Simulations(theta, codes, round=used.round)
        posterior, history = self.estimator.fit(key, coded, progress=progress)
        own = EncodedPosterior(
            posterior,
            encoder,
            observation_shape(simulations.x),
            _can_miss(used) if has_mask else None,
            UsedRows.of(simulations, posterior.prior),
            posterior.record,
        )
        return own, history


def _can_miss(simulations: Simulations) -> np.ndarray:
    """Return whether each entry of a flattened observation is missing in any row, shape (C,)."""
    found = []
    for start in range(0, len(simulations), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        block = jax.tree.map(lambda a, rows=rows: a[rows], simulations.x)
        found.append(np.isnan(rows_on_host(block)).any(axis=0))
    return np.any(np.stack(found), axis=0)
