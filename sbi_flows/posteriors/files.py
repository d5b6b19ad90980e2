"""A posterior as one file.

Public names: `load`, `save`.

The file holds no code and names none: a load builds objects of this library and of numpyro from
tables of names, checks every array against the model before it is read, and runs nothing else.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbi_flows.artefact import embeddings, ensembles, gates, priors
from sbi_flows.artefact.container import Entry, File, packed
from sbi_flows.artefact.distributions import Tensors
from sbi_flows.artefact.strict import checked, counted, fields, items, number
from sbi_flows.core.errors import ArtefactError
from sbi_flows.core.files import whole_file
from sbi_flows.core.record import to_json_data
from sbi_flows.core.versions import versions
from sbi_flows.densities.conditional import Embedding, check_embedding
from sbi_flows.observations.standardise import Standardiser
from sbi_flows.observations.typicality import widths
from sbi_flows.posteriors import corrections
from sbi_flows.posteriors.base import Derived
from sbi_flows.posteriors.direct import Posterior
from sbi_flows.prior.prior import Prior, PriorLike, as_prior

FORMAT = 2
"""Version of the document, which later versions of the library go on reading. A file is of the
first version that can say what is in it: 1, or 2 if the posterior was corrected."""

_PRECISIONS = ("float32", "float64")
_STANDARDISER = ("standardiser/center", "standardiser/scale", "standardiser/floor")


def load(
    path: str | os.PathLike[str],
    *,
    prior: PriorLike | None = None,
    embedding: Embedding | Sequence[Embedding] | None = None,
) -> Posterior | Any:
    """Read a posterior that `Posterior.save` wrote; safe for files from anywhere.

    Nothing in the file is executed or imported, and memory stays within some three times its size.
    What a posterior from an untrusted source says is another matter: check it as your own.

    Draws for the same key are the same, bit for bit, on the same device with the same versions.
    Where JAX computes in another precision than the file was written in, weights are rounded (or
    widened) to it, and log densities then agree to about 1e-3.

    Args:
        path: The file.
        prior: The prior, where the file only has its structure: a numpyro model whose parameters
            depend on each other, or distributions of the user's own. It is compared with the
            record.
        embedding: The embedding, where it is none of this library's, likewise; of a stack with
            several of these a list, in its order.

    Returns:
        The posterior; `record` holds what was known of its fit. A `ConformalPosterior` or a
        `RecalibratedPosterior` comes back as what it was.

    Raises:
        ArtefactError: The file is no such file, was changed, or needs a prior or an embedding that
            was not given or is another one.
        ValueError: What was given is no prior or no embedding.
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
    given = None if prior is None else as_prior(prior)
    own: list[Any] = list(embedding) if isinstance(embedding, list | tuple) else [embedding]
    for each in own:
        if each is not None:
            check_embedding(each)
    with open(path, "rb") as file:
        try:
            return _loaded(File(file), given, own)
        except ArtefactError as error:
            raise ArtefactError(f"{os.fspath(path)}: {error}") from None
        # whatever a library says to what it was never made for
        except Exception as error:
            raise ArtefactError(
                f"{os.fspath(path)}: it describes no posterior that can be built: "
                f"{type(error).__name__}: {str(error)[:500]}"
            ) from error


def save(
    posterior: Posterior | Derived, path: str | os.PathLike[str], *, report: Any = None
) -> None:
    """Write a posterior; see `Posterior.save`."""
    path = Path(path)
    content = packed(*_described(posterior, report))
    with whole_file(path) as file:
        file.write(content)


def _described(given: Posterior | Derived, report: Any) -> tuple[dict[str, Any], Tensors]:
    """The document and the tensors of a posterior."""
    if report is not None:
        found = {"check": _plain_report(report)}
        given = dataclasses.replace(given, record={**given.record, **found})  # type: ignore[type-var]
    posterior, made = corrections.peeled(given)
    standardiser, tensors = posterior.standardiser, Tensors()
    precision = np.dtype(standardiser.center.dtype).name
    x64 = precision == _PRECISIONS[1]
    prior = priors.encode(posterior.prior, tensors)
    for name, array in zip(_STANDARDISER, standardiser[:3], strict=True):
        tensors[name] = np.asarray(array)
    parts = zip(posterior.blueprints, posterior.weights, posterior.shares, strict=True)
    written = []
    for i, (blueprint, weights, share) in enumerate(parts):
        own = ensembles.encode(i, blueprint, weights, posterior.observation, x64, tensors)
        written.append({**own, "share": float(share)})
    document = {
        "format": FORMAT if made else 1,
        "written_by": versions(),
        "precision": precision,
        "prior": prior,
        "observation": ensembles.observation_of(posterior.observation),
        "linear": float(standardiser.linear),
        "ensembles": written,
        "typicality": gates.encode(posterior.typicality, tensors),
        "record": dict(posterior.record),
    }
    if made:
        document["corrections"] = corrections.encode(made, posterior.prior.standard_dim, tensors)
    return document, tensors


def _plain_report(report: Any) -> Any:
    from sbi_flows.diagnostics import Report

    if not isinstance(report, Report):
        raise ValueError(f"report: expected an sf.Report, got {type(report).__name__}")
    return to_json_data(report.to_dict())


def _loaded(file: File, given: Prior | None, own: list[Embedding | None]) -> Any:
    version = counted("format", file.document.get("format"), 1, 2**31)
    if version > FORMAT:
        raise ArtefactError(
            f"format: expected one up to {FORMAT}, got {version}: a later version of sbi_flows "
            f"wrote it ({str(file.document.get('written_by'))[:200]})"
        )
    later = file.document.pop("corrections", None) if version > 1 else None
    names = ("format", "written_by", "precision", "prior", "observation", "linear")
    _, _, precision, prior, observation, linear, parts, spaces, record = fields(
        "document", file.document, *names, "ensembles", "typicality", "record"
    )
    if precision not in _PRECISIONS:
        raise ArtefactError(f"precision: expected one of {_PRECISIONS}, got {precision!r:.80}")
    spaces = counted("typicality", spaces, 0, gates.MOST_SPACES)
    record = checked("record", record, dict, "an object")
    observation = ensembles.observation_from(observation)
    parts, shares = _shares(parts)
    wanted = [embeddings.is_given(part.get("embedding")) for part in parts]
    bounded, mine = _bounded(prior), _own(own, wanted)
    found = [
        ensembles.decode(i, part, bounded, observation, mine[i]) for i, part in enumerate(parts)
    ]
    known = {*priors.referred(prior), *gates.names(spaces)}
    made_later: list[corrections.Correction] = []
    if version > 1:
        made_later, theirs = corrections.require(later, len(bounded), file.table)
        known |= theirs
    _require_tensors(file.table, found, wanted, known, observation, precision)
    # from here on arrays are read: there are no others, and none is larger than it should be
    made = priors.decode(prior, {n: file.tensor(n) for n in priors.referred(prior)}, given)
    dtype = jnp.result_type(float)
    center, scale, floor = (jnp.asarray(file.tensor(name), dtype) for name in _STANDARDISER)
    standardiser = Standardiser(center, scale, floor, number("linear", linear))
    weights = tuple(ensembles.weights_of(ensemble, file.tensor) for ensemble in found)
    for ensemble, stacked, asked in zip(found, weights, wanted, strict=True):
        if asked:
            embeddings.compare(ensemble.blueprint, stacked, file.tensor(ensemble.answered))
    blueprints = tuple(ensemble.blueprint for ensemble in found)
    sizes = widths(blueprints[0], weights[0], len(center)) if spaces else ()
    typicality = gates.decode(spaces, sizes, file.table, file.tensor)
    facts = MappingProxyType(record)
    posterior = Posterior(
        made, blueprints, weights, shares, standardiser, observation, facts, typicality
    )
    return corrections.decode(made_later, posterior, file.tensor)


def _require_tensors(
    table: Mapping[str, Entry],
    found: list[ensembles.Ensemble],
    wanted: list[bool],
    others: set[str],
    observation: Any,
    precision: str,
) -> None:
    """Refuse a table that lacks a tensor, has one too many, or one that is not as it should be."""
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(observation))
    for name in _STANDARDISER:
        ensembles.require_entry(name, Entry(np.dtype(precision), (count,), 0), table)
    known = {*_STANDARDISER, *others}
    for ensemble, asked in zip(found, wanted, strict=True):
        known |= ensembles.require(ensemble, asked, table, precision == _PRECISIONS[1])
    if odd := sorted(table.keys() ^ known):
        raise ArtefactError(f"tensors: expected those of the posterior alone, not {odd[:3]}")


def _shares(value: Any) -> tuple[list[dict[str, Any]], tuple[float, ...]]:
    """The ensembles' own data, and their shares of the mixture."""
    parts = items("ensembles", value, ensembles.MOST_ENSEMBLES)
    parts = [dict(checked("ensembles", part, dict, "an object")) for part in parts]
    shares = tuple(number("share", part.pop("share", None)) for part in parts)
    if not shares or min(shares) <= 0.0 or abs(sum(shares) - 1.0) > 1e-6:
        raise ArtefactError(f"share: expected positive ones that add up to 1, got {shares!r:.80}")
    return parts, shares


def _bounded(prior: Any) -> tuple[bool, ...]:
    """Which standard coordinates are bounded, as the prior's record says."""
    found = checked("prior", prior, dict, "an object").get("bounded")
    found = items("prior.bounded", found, priors.MOST_ENTRIES)
    return tuple(checked("prior.bounded", b, bool, "truth values") for b in found)


def _own(given: list[Embedding | None], wanted: list[bool]) -> list[Embedding | None]:
    """The user's embedding for each ensemble that needs one; one alone is that of all."""
    count = sum(wanted)
    if given == [None]:
        return given * len(wanted)
    if len(given) not in (1, count) or not count:
        raise ArtefactError(f"embedding: expected {count} of them, got {len(given)}")
    left = iter(given * count if len(given) == 1 else given)
    return [next(left) if asked else None for asked in wanted]
