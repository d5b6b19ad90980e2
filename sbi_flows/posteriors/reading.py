"""Load a posterior from a file.

A file contains no code and no names of modules or functions. Loading builds objects only from fixed
tables of classes of this library and of numpyro. The shape and dtype of every array are checked
against the model before the array is read.

Public name: `load`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from sbi_flows.artefact.container import ArtefactFile
from sbi_flows.artefact.layers import Header, read_layer, require_layers
from sbi_flows.artefact.strict import expect_integer
from sbi_flows.core.errors import ArtefactError
from sbi_flows.densities.embedding import Embedding, check_embedding
from sbi_flows.densities.encoder import Network, check_network
from sbi_flows.posteriors import codec_direct
from sbi_flows.posteriors.composed import ComposedPosterior
from sbi_flows.posteriors.conformal import ConformalPosterior
from sbi_flows.posteriors.direct import Posterior
from sbi_flows.posteriors.encoded import EncodedPosterior
from sbi_flows.posteriors.recalibrated import RecalibratedPosterior
from sbi_flows.posteriors.writing import DIRECT_FORMAT
from sbi_flows.prior.prior import Prior, PriorLike, as_prior

DERIVED = (ComposedPosterior, ConformalPosterior, EncodedPosterior, RecalibratedPosterior)
"""Classes of derived posteriors that can be loaded; each has `codec` and `from_layer`."""

_KINDS = {kind.codec.kind: kind for kind in DERIVED}
_CODECS = {name: kind.codec for name, kind in _KINDS.items()}

MAX_FORMAT = max([DIRECT_FORMAT, *(codec.file_format for codec in _CODECS.values())])
"""Latest version of the file format that this version of the library reads."""


def load(
    path: str | os.PathLike[str],
    *,
    prior: PriorLike | None = None,
    embedding: Embedding | Sequence[Embedding] | None = None,
    network: Network | None = None,
) -> Any:
    """Load a posterior that `Posterior.save` wrote; safe for files from unknown sources.

    Nothing in the file is executed or imported. Loading needs memory of about three times the file
    size. A file from an unknown source may contain a wrong posterior, so check the posterior.

    A loaded posterior gives identical draws for the same key on the same device with the same
    package versions. If JAX's current precision differs from the precision of the file, weights
    are converted, and log densities agree to about 1e-3.

    Args:
        path: Path of the file.
        prior: The prior. It is needed only if the file cannot store it completely: a numpyro model
            whose parameters depend on each other, or a distribution class of your own. It must
            agree with the saved prior.
        embedding: The embedding. It is needed only if its class is not part of this library. It
            must agree with the saved embedding. For a stack with several such embeddings, pass a
            list in the stack's order.
        network: The trained network of an `sf.Encoded` estimator, which the file does not contain.
            It must agree with the network of the fit.

    Returns:
        The posterior, of the class that was saved. Its attribute `record` describes the fit.

    Raises:
        ArtefactError: The file is not a saved posterior or was changed; or a prior, embedding or
            network is needed that was not supplied or that differs from the saved one.
        ValueError: `prior` is not a prior, `embedding` is not an embedding, or `network` is not a
            network.
        OSError: The file cannot be read.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf, tempfile
        >>> prior = dist.Normal(0.0, 1.0).expand([1])
        >>> noisy = lambda key, theta: theta + jax.random.normal(key, (1,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 200, progress=False)
        >>> small = sf.MAF(transforms=1, hidden=(8,), context_width=0)
        >>> npe = sf.NPE(prior, small, training=sf.Training(max_epochs=1), members=1)
        >>> posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     posterior.save(f"{folder}/small.sbif")
        ...     again = load(f"{folder}/small.sbif")
        >>> key, x = jax.random.key(2), sims.x[0]
        >>> bool((again.sample(key, x, 5) == posterior.sample(key, x, 5)).all())
        True
    """
    user_prior = None if prior is None else as_prior(prior)
    user_embeddings: list[Any]
    user_embeddings = list(embedding) if isinstance(embedding, list | tuple) else [embedding]
    for each in user_embeddings:
        if each is not None:
            check_embedding(each)
    if network is not None:
        check_network(network)
    with open(path, "rb") as file:
        try:
            return _read(ArtefactFile(file), user_prior, user_embeddings, network)
        except ArtefactError as error:
            raise ArtefactError(f"{os.fspath(path)}: {error}") from None
        # other libraries may raise any error for arguments that passed our checks
        except Exception as error:
            raise ArtefactError(
                f"{os.fspath(path)}: it describes no posterior that can be built: "
                f"{type(error).__name__}: {str(error)[:500]}"
            ) from error


def _read(
    file: ArtefactFile,
    user_prior: Prior | None,
    user_embeddings: list[Any],
    network: Network | None,
) -> Any:
    """Check the document and the table of tensors, then read the arrays and build the posterior."""
    document = dict(file.document)
    version = _require_version(document)
    corrections = document.pop("corrections", None) if version > DIRECT_FORMAT else None
    direct = codec_direct.require_header(document, user_embeddings)
    headers: list[Header] = []
    if version > DIRECT_FORMAT:
        headers = require_layers(corrections, _CODECS, len(direct.bounded), file.table)
    names = codec_direct.require_tensors(direct, file.table)
    names |= {f"{h.prefix}/{name}" for h in headers for name in h.tensor_names}
    if odd := sorted(file.table.keys() ^ names):
        raise ArtefactError(f"tensors: expected exactly those of the posterior, not {odd[:3]}")
    # read arrays only now, after the checks of their names and sizes
    contents = codec_direct.decode(direct, file, user_prior)
    posterior: Any = Posterior(**contents._asdict())
    for header in headers:
        layer = read_layer(header, file.tensor)
        kind = _KINDS[header.codec.kind]
        given = {"network": network} if kind is EncodedPosterior else {}
        try:
            posterior = kind.from_layer(posterior, layer, **given)
        # this class of posterior cannot be derived from the base posterior
        except ValueError as error:
            raise ArtefactError(f"{header.name}: {error}") from None
    return posterior


def _require_version(document: Mapping[str, Any]) -> int:
    """Return the version of the file format; raise ArtefactError if it is too new."""
    version = expect_integer("format", document.get("format"), 1, 2**31)
    if version > MAX_FORMAT:
        raise ArtefactError(
            f"format: expected one up to {MAX_FORMAT}, got {version}: a later version of sbi_flows "
            f"wrote it ({str(document.get('written_by'))[:200]})"
        )
    return version
