"""Estimator whose observations a frozen network encodes.

Public names: `Encoded`.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from sbi_flows.core.checks import require_object
from sbi_flows.core.doubles import is_double
from sbi_flows.core.typing import Key
from sbi_flows.densities.encoder import (
    Encoder,
    Network,
    check_network,
    encoded_rows,
    takes_mask,
)
from sbi_flows.estimators.base import Estimator, FitHistory
from sbi_flows.observations.standardise import entry_count, rows_on_host
from sbi_flows.posteriors.encoded import EncodedPosterior
from sbi_flows.simulations.fingerprints import UsedRows
from sbi_flows.simulations.simulations import Simulations, observation_shape
from sbi_flows.training.record import of_fit

_BLOCK_ENTRIES = 2**22
"""Number of entries in which missing ones are looked for at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Estimator that uses a network that is already trained as a fixed summary statistic.

    The network's output for one observation, a vector of F numbers, is called its code. All codes
    are computed once, before the fit, which then costs no more than a fit to F numbers. An
    `embedding` of `NPE`, in contrast, is trained together with the density.

    Attributes:
        estimator: `NPE` or `Stack` for codes (F,), without `missing`: hide entries of the
            simulations before the fit, by `Simulations.hide`.
        network: Trained flax module, or JAX function, from observations (B, *event) in the user's
            units to codes (B, F). Modules with BatchNorm or Dropout must be set to evaluation by
            `network.eval()`. If observations lack entries, it must have an argument `mask`: for
            each array, True where an entry is present. Missing entries of x are then zero.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0.0, 1.0).expand([1])
        >>> image = lambda key, theta: theta[0] + jax.random.normal(key, (4, 4))
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
        parts = getattr(self.estimator, "estimators", (self.estimator,))
        if any(getattr(part, "missing", None) is not None for part in parts):
            raise ValueError(
                "missing: expected none, as codes have no missing entries; hide entries of the "
                "simulations before the fit: simulations.hide(key, pattern)"
            )

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
            ValueError: Single precision cannot hold the observations, and JAX is not in double
                precision; the network has no argument `mask` although entries are missing; it
                returns no array (B, F), or codes that are not finite; or the code of an observation
                depends on the other observations of a batch. See also `NPE.fit`.
        """
        require_object("simulations", simulations, Simulations, "sf.Simulations")
        has_mask = simulations.missing
        if has_mask and not takes_mask(self.network):
            raise ValueError(
                "network: expected an argument `mask`, True where an entry is present, because "
                "entries are missing; write def network(x, mask=None)"
            )
        if any(map(is_double, jax.tree.leaves(simulations.x))):
            raise ValueError(
                "x: expected numbers that single precision holds, because the network computes in "
                "it; subtract large offsets first, or set jax_enable_x64"
            )
        encoder = Encoder.of(self.network)
        codes = encoded_rows(encoder, simulations.x, has_mask=has_mask, progress=progress)
        valid = np.asarray(simulations.valid)
        count = int(np.sum(~np.isfinite(codes[valid]).all(axis=1)))
        if count:
            raise ValueError(f"network: expected finite codes, got NaN or infinity in {count} rows")
        theta = simulations.aligned(self.estimator.prior).theta
        coded = Simulations(theta, codes, valid=valid, round=simulations.round)
        posterior, history = self.estimator.fit(key, coded, progress=progress)
        first = np.flatnonzero(valid)[:2]
        own = EncodedPosterior(
            posterior,
            encoder,
            observation_shape(simulations.x),
            _can_miss(simulations) if has_mask else None,
            jax.tree.map(lambda a: np.asarray(a[first]), simulations.x),
            UsedRows.of(simulations, posterior.prior),
            of_fit(self.estimator, simulations, history),
        )
        return own, history


def _can_miss(simulations: Simulations) -> np.ndarray:
    """Return whether each entry of a flattened observation is missing in any valid row, (C,)."""
    found, valid = [], np.asarray(simulations.valid)
    size = max(1, _BLOCK_ENTRIES // entry_count(observation_shape(simulations.x)))
    for start in range(0, len(simulations), size):
        rows = slice(start, start + size)
        block = jax.tree.map(lambda a, rows=rows: a[rows], simulations.x)
        found.append(np.isnan(rows_on_host(block)[valid[rows]]).any(axis=0))
    return np.any(np.stack(found), axis=0)
