"""Fixed summaries of observations, without a network.

Public names: `Summaries`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from sbi_flows.networks.embeddings.base import EmbeddingSettings, require_network
from sbi_flows.observations.shared import SharedAxes


@dataclasses.dataclass(frozen=True)
class Summaries(EmbeddingSettings):
    """The fixed summaries of an embedding, such as moments, quantiles and spectra.

    The posterior is conditioned on these summaries alone; there is no network to train. A fit is
    fast, and needs few simulations. The posterior ignores what the summaries do not contain, such
    as the shape of an object in an image; `sf.check` can show that information is lost, but cannot
    prove that none is. An emulator (`sf.NPE(..., emulator=...)`) learns the density of the
    summaries given the parameters (a synthetic likelihood). Averages over many points are nearly
    Gaussian, so this density is easy to learn.

    Attributes:
        embedding: The embedding whose summaries are used, such as `ConvNet()`.

    Raises:
        ValueError: `embedding` is not an embedding of this library, or is itself `Summaries`.

    References:
        Wood 2010, Statistical inference for noisy nonlinear ecological dynamic systems, Nature
        466:1102, for synthetic likelihoods.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from sbi_flows.networks.embeddings import ConvNet
        >>> settings = Summaries(ConvNet())
        >>> like = jax.ShapeDtypeStruct((16, 16), jnp.float32)
        >>> settings.summary_labels(like)[:3]
        ('n', 'mean', 'mean square')
        >>> settings.summarise(jnp.ones((5, 16, 16)), None).shape
        (5, 31)
    """

    summaries_only: ClassVar[bool] = True
    embedding: EmbeddingSettings

    def __post_init__(self) -> None:
        """Check the embedding."""
        require_network("embedding", self.embedding, "one such as sf.ConvNet()")

    @property
    def features(self) -> int:  # type: ignore[override]  # there is no network
        """Number of outputs of a network: 0."""
        return 0

    def check(self, like: Any) -> None:
        """Raise ValueError if one observation does not suit the embedding."""
        self.embedding.check(like)

    def shared(self, like: Any) -> SharedAxes:
        """Return the axes of each array along which all entries share one standardisation."""
        return self.embedding.shared(like)

    def growing(self, like: Any) -> SharedAxes:
        """Return the axes of each array along which an observation may be shorter."""
        return self.embedding.growing(like)

    def summary_labels(self, like: Any) -> tuple[str, ...]:
        """Return the names of the fixed summaries."""
        return self.embedding.summary_labels(like)

    def summarise(self, x: Any, mask: Any) -> Array:
        """Compute the fixed summaries (B, K)."""
        return self.embedding.summarise(x, mask)

    def build(self, rngs: nnx.Rngs, like: Any) -> nnx.Module:
        """Raise TypeError: there is no network."""
        raise TypeError("expected an embedding with a network, got Summaries")
