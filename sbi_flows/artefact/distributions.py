"""Distributions of numpyro as plain data, by names in one table.

A distribution, a transform or a constraint is written as `{"type": name, "arguments": {...}}`, with
what its constructor takes. Arrays among the arguments are tensors of the file, with all their bits;
Python's own numbers stay such, since in Python they are computed with in double precision.

Public names: `encode`, `decode`, `referred`, `Tensors`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints, transforms

from sbi_flows.artefact.strict import checked, counted, fields, items, number
from sbi_flows.core.errors import ArtefactError

Tensors = dict[str, np.ndarray]
"""By name; what is written is added."""

_ARGUMENTS = {
    "AsymmetricLaplace": "loc scale asymmetry",
    "AsymmetricLaplaceQuantile": "loc scale quantile",
    "Beta": "concentration1 concentration0",
    "CategoricalLogits": "logits",
    "CategoricalProbs": "probs",
    "Cauchy": "loc scale",
    "Chi2": "df",
    "Dirichlet": "concentration",
    "ExpandedDistribution": "base_dist batch_shape",
    "Exponential": "rate",
    "Gamma": "concentration rate",
    "GaussianRandomWalk": "scale num_steps",
    "Gompertz": "concentration rate",
    "Gumbel": "loc scale",
    "HalfCauchy": "scale",
    "HalfNormal": "scale",
    "Independent": "base_dist reinterpreted_batch_ndims",
    "InverseGamma": "concentration rate",
    "Kumaraswamy": "concentration1 concentration0",
    "LKJ": "dimension concentration sample_method",
    "LKJCholesky": "dimension concentration sample_method",
    "Laplace": "loc scale",
    "LeftTruncatedDistribution": "base_dist low",
    "Levy": "loc scale",
    "LogNormal": "loc scale",
    "LogUniform": "low high",
    "Logistic": "loc scale",
    "LowRankMultivariateNormal": "loc cov_factor cov_diag",
    "MatrixNormal": "loc scale_tril_row scale_tril_column",
    "MixtureGeneral": "mixing_distribution component_distributions",
    "MixtureSameFamily": "mixing_distribution component_distribution",
    "MultivariateNormal": "loc scale_tril",
    "MultivariateStudentT": "df loc scale_tril",
    "Normal": "loc scale",
    "Pareto": "scale alpha",
    "RightTruncatedDistribution": "base_dist high",
    "SoftLaplace": "loc scale",
    "StudentT": "df loc scale",
    "TransformedDistribution": "base_distribution:base_dist transforms",
    "TwoSidedTruncatedDistribution": "base_dist low high",
    "Uniform": "low high",
    "VonMises": "loc concentration",
    "Weibull": "scale concentration",
    "AbsTransform": "",
    "AffineTransform": "loc scale domain",
    "CholeskyTransform": "",
    "ComposeTransform": "parts",
    "CorrCholeskyTransform": "",
    "CorrMatrixCholeskyTransform": "",
    "ExpTransform": "domain",
    "IdentityTransform": "",
    "IndependentTransform": "base_transform reinterpreted_batch_ndims",
    "LowerCholeskyAffine": "loc scale_tril",
    "LowerCholeskyTransform": "",
    "OrderedTransform": "",
    "PermuteTransform": "permutation",
    "PowerTransform": "exponent",
    "ScaledUnitLowerCholeskyTransform": "",
    "SigmoidTransform": "",
    "SoftplusLowerCholeskyTransform": "",
    "SoftplusTransform": "",
    "StickBreakingTransform": "",
    "greater_than": "lower_bound",
    "interval": "lower_bound upper_bound",
    "less_than": "upper_bound",
}
"""Arguments of a constructor, and the attribute that has each of them where its name is another."""

_MODULES = (dist, transforms, constraints)
_CLASSES = {n: next(getattr(m, n) for m in _MODULES if hasattr(m, n)) for n in _ARGUMENTS}
_NAMES = {kind: name for name, kind in _CLASSES.items()}

_CONSTRAINTS = {
    name: getattr(constraints, name)
    for name in (
        *("circular", "nonnegative", "ordered_vector", "positive", "real", "real_vector"),
        *("simplex", "softplus_positive", "unit_interval"),
    )
}

MOST_STEPS = 1024
"""Of what a distribution computes with when it is made: rows of a matrix, steps of a walk."""

_STEPS = {"dimension", "num_steps", "reinterpreted_batch_ndims"}
_INFINITE = {"inf": math.inf, "-inf": -math.inf}


def encode(name: str, value: Any, tensors: Tensors) -> Any:
    """A distribution or an argument of one as plain data; its arrays become tensors.

    Raises:
        ValueError: A part is of a class that is not in the table.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _encoded_array(name, value, tensors)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and not math.isnan(value):
        return value if math.isfinite(value) else {"number": str(value)}
    if isinstance(value, list | tuple):
        return [encode(name, part, tensors) for part in value]
    kind = _NAMES.get(type(value))
    if kind is not None:
        pairs = [argument.split(":") for argument in _ARGUMENTS[kind].split()]
        found = {a: encode(name, getattr(value, at[-1] if at else a), tensors) for a, *at in pairs}
        return {"type": kind, "arguments": found}
    for constraint, known in _CONSTRAINTS.items():
        if value is known:
            return {"constraint": constraint}
    raise ValueError(f"{name}: {type(value).__name__} is none of numpyro's that can be written")


def decode(name: str, value: Any, tensors: Mapping[str, Any]) -> Any:
    """What `encode` made data of.

    Args:
        name: What errors call it.
        value: The data.
        tensors: Arrays of the file by name; `jax.ShapeDtypeStruct` or tracers will do.

    Raises:
        ArtefactError: The data name what is not in the table, or no tensor.
    """
    return _decoded(name, "", value, tensors)


def referred(value: Any) -> list[str]:
    """Names of the tensors that plain data refer to."""
    if isinstance(value, dict):
        own = [value["tensor"]] if isinstance(value.get("tensor"), str) else []
        return own + [name for part in value.values() for name in referred(part)]
    return [name for part in value for name in referred(part)] if isinstance(value, list) else []


def _encoded_array(name: str, value: Any, tensors: Tensors) -> dict[str, Any]:
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) or value.dtype.kind not in "biufV":
        raise ValueError(f"{name}: an array of {value.dtype} cannot be written")
    place = f"prior/{len(tensors)}"
    tensors[place] = np.asarray(value)
    return {"tensor": place, "numpy": not isinstance(value, jax.Array)}


def _decoded(name: str, argument: str, value: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        parts = [_decoded(name, argument, part, tensors) for part in items(name, value, 1024)]
        return tuple(parts) if all(isinstance(part, int) for part in parts) else parts
    if isinstance(value, int) and not isinstance(value, bool) and argument in _STEPS:
        return counted(f"{name}: {argument}", value, 0, MOST_STEPS)
    if not isinstance(value, dict):
        return value if argument == "sample_method" else number(f"{name}: {argument}", value)
    if "tensor" in value:
        place, numpy = fields(name, value, "tensor", "numpy")
        return _array(name, place, numpy, tensors)
    if "number" in value or "constraint" in value:
        (key,) = value
        known: dict[str, Any] = _INFINITE if key == "number" else _CONSTRAINTS
        return _named(name, known, value[key])
    kind, given = fields(name, value, "type", "arguments")
    made = _named(name, _CLASSES, kind)
    expected = [argument.split(":")[0] for argument in _ARGUMENTS[kind].split()]
    values = zip(expected, fields(f"{name}: {kind}", given, *expected), strict=True)
    arguments = {n: _decoded(name, n, v, tensors) for n, v in values}
    try:
        return made(**arguments)
    except (ValueError, TypeError, AttributeError, AssertionError, IndexError) as error:
        raise ArtefactError(f"{name}: {kind}: {str(error)[:200]}") from None


def _named(name: str, known: Mapping[str, Any], kind: Any) -> Any:
    if not isinstance(kind, str) or kind not in known:
        raise ArtefactError(f"{name}: expected one of {sorted(known)}, got {kind!r:.80}")
    return known[kind]


def _array(name: str, place: Any, numpy: Any, tensors: Mapping[str, Any]) -> Any:
    if not isinstance(place, str) or place not in tensors:
        raise ArtefactError(f"{name}: expected a tensor of the file, got {place!r:.80}")
    array = tensors[place]
    if not isinstance(array, np.ndarray):
        return array
    if checked(name, numpy, bool, "a truth value"):
        return array if array.ndim else array[()]
    return jnp.asarray(array)
