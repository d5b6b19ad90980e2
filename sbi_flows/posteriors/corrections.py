"""Corrections of a posterior in an artefact: what `conformal` and `recalibrate` made of it.

They come one after the other, from the posterior outwards. Their arrays are small: the scores or
the quantiles that they were made of, and the random key by which they answer the same every time.

Public names: `Correction`, `peeled`, `encode`, `require`, `decode`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sbi_flows.artefact.container import Entry
from sbi_flows.artefact.distributions import Tensors
from sbi_flows.artefact.ensembles import require_entry
from sbi_flows.artefact.strict import checked, counted, fields, items
from sbi_flows.core.errors import ArtefactError
from sbi_flows.posteriors.conformal import ConformalPosterior
from sbi_flows.posteriors.direct import Posterior
from sbi_flows.posteriors.passes import MIN_DRAWS
from sbi_flows.posteriors.quantile_maps import Quantiles, increasing
from sbi_flows.posteriors.recalibrated import RecalibratedPosterior

MOST_CORRECTIONS = 16

MOST_DRAWS = 2**20
"""Of a posterior at each observation that a correction is asked about."""

MOST = 2**53

_KINDS = {"conformal": ConformalPosterior, "recalibrated": RecalibratedPosterior}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_FIELDS = ("type", "simulations", "failed", "draws", "key", "record")
_WORDS = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}
"""Of 32 bits in a random key, by what JAX calls its generators."""


class Correction(NamedTuple):
    """What is known of a correction before its arrays are read."""

    kind: str
    simulations: int
    failed: int
    draws: int
    generator: str
    record: Mapping[str, Any]
    prefix: str


def peeled(posterior: Any) -> tuple[Posterior, list[Any]]:
    """The posterior within, and its corrections, from the first to the last.

    Raises:
        ValueError: There is another kind of posterior within.
    """
    found = []
    while type(posterior) in _NAMES:
        found.insert(0, posterior)
        posterior = posterior.posterior
    if not isinstance(posterior, Posterior):
        raise ValueError(
            "posterior: expected an sf.Posterior, or what conformal or recalibrate made of one, "
            f"got {type(posterior).__name__}, which cannot be saved"
        )
    return posterior, found


def encode(made: list[Any], dim: int, tensors: Tensors) -> list[dict[str, Any]]:
    """Corrections as plain data; their arrays become tensors.

    Args:
        made: They, from the first to the last.
        dim: Number of the prior's standard coordinates.
        tensors: Tensors of the file, to which theirs are added.

    Raises:
        ValueError: One could not be read again.
    """
    written, own = [], Tensors()
    for i, correction in enumerate(made):
        key = correction._key
        written.append(
            {
                "type": _NAMES[type(correction)],
                "simulations": int(correction.num_simulations),
                "failed": int(correction.num_failed),
                "draws": int(correction.draws),
                "key": str(jax.random.key_impl(key)),
                "record": dict(correction.record),
            }
        )
        arrays = {"key": np.asarray(jax.random.key_data(key)), **_arrays(correction)}
        own |= {f"corrections/{i}/{name}": array for name, array in arrays.items()}
    try:
        table = {name: Entry(array.dtype, array.shape, 0) for name, array in own.items()}
        found, _ = require(written, dim, table)
        decode(found, made[0].posterior, own.__getitem__)
    except ArtefactError as error:
        raise ValueError(f"the correction cannot be saved: {error}") from None
    tensors |= own
    return written


def require(value: Any, dim: int, table: Mapping[str, Entry]) -> tuple[list[Correction], set[str]]:
    """What the corrections are, and the names of their tensors, all of which are in the table.

    Args:
        value: The data.
        dim: Number of the prior's standard coordinates.
        table: The tensors of the file.

    Raises:
        ArtefactError: The data are malformed, or a tensor is missing or another one.
    """
    value = items("corrections", value, MOST_CORRECTIONS)
    counted("corrections: number", len(value), 1, MOST_CORRECTIONS)
    found, known = [], set()
    for i, part in enumerate(value):
        name = f"corrections[{i}]"
        kind, simulations, failed, draws, generator, record = fields(name, part, *_FIELDS)
        for named, what, among in (("type", kind, _KINDS), ("key", generator, _WORDS)):
            if not isinstance(what, str) or what not in among:
                raise ArtefactError(f"{name}.{named}: expected one of {[*among]}, got {what!r:.80}")
        correction = Correction(
            kind,
            counted(f"{name}.simulations", simulations, 1, MOST),
            counted(f"{name}.failed", failed, 0, MOST),
            counted(f"{name}.draws", draws, MIN_DRAWS, MOST_DRAWS),
            generator,
            checked(f"{name}.record", record, dict, "an object"),
            f"corrections/{i}",
        )
        found.append(correction)
        known |= _require_tensors(correction, dim, table)
    return found, known


def decode(found: list[Correction], posterior: Posterior, read: Callable[[str], np.ndarray]) -> Any:
    """The posterior with its corrections.

    Args:
        found: What `require` found.
        posterior: What they correct.
        read: Function of a tensor's name to its array.

    Raises:
        ArtefactError: A tensor holds numbers that cannot be.
    """
    made: Any = posterior
    for own in found:
        words = jnp.asarray(read(f"{own.prefix}/key"))
        key = jax.random.wrap_key_data(words, impl=own.generator)
        facts, scores = MappingProxyType(dict(own.record)), read(f"{own.prefix}/scores")
        if own.kind == "conformal":
            if np.any(np.isnan(scores)) or np.any(scores[1:] < scores[:-1]):
                raise ArtefactError(f"{own.prefix}/scores: expected them in order, got others")
            made = ConformalPosterior(made, scores, own.failed, own.draws, key, facts)
        else:
            values = _knots(f"{own.prefix}/values", read(f"{own.prefix}/values"))
            correction = Quantiles(_knots(f"{own.prefix}/scores", scores), values)
            counts = (own.simulations, own.failed, own.draws)
            made = RecalibratedPosterior(made, correction, *counts, key, facts)
    return made


def _arrays(correction: Any) -> Tensors:
    """The arrays of a correction but its key."""
    if isinstance(correction, ConformalPosterior):
        return {"scores": np.asarray(correction.scores)}
    return {n: np.asarray(a) for n, a in correction.correction._asdict().items()}


def _require_tensors(own: Correction, dim: int, table: Mapping[str, Entry]) -> set[str]:
    key, scores, values = (f"{own.prefix}/{name}" for name in ("key", "scores", "values"))
    require_entry(key, Entry(np.dtype(np.uint32), (_WORDS[own.generator],), 0), table)
    if own.kind == "conformal":
        require_entry(scores, Entry(np.dtype(np.float64), (own.simulations,), 0), table)
        return {key, scores}
    entry = table.get(scores)
    if (
        entry is None
        or entry.dtype.name not in ("float32", "float64")
        or len(entry.shape) != 2
        or entry.shape[0] != dim
        or entry.shape[1] < 2
    ):
        raise ArtefactError(
            f"{scores}: expected a tensor of float32 or float64 [{dim}, 2 or more], got "
            f"{entry or 'none'!s}"
        )
    require_entry(values, entry, table)
    return {key, scores, values}


def _knots(name: str, array: np.ndarray) -> jax.Array:
    """Increasing numbers (d, K), in the precision that is on."""
    if not np.all(np.isfinite(array)) or np.any(np.diff(array, axis=1) <= 0.0):
        raise ArtefactError(f"{name}: expected finite numbers that increase, got others")
    held = jnp.asarray(array, jnp.result_type(float))
    # what is apart in double precision need not be so in single
    apart = bool(np.all(np.diff(np.asarray(held), axis=1) > 0.0))
    return held if apart else increasing(held)
