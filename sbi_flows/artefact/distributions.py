"""Codec of numpyro distributions. A table lists the classes that can be saved.

A distribution, a transform or a constraint is written as `{"type": name, "arguments": {...}}`, with
the arguments of its constructor. Arrays become tensors of the file, bit for bit. Python numbers
become JSON numbers, because Python computes with them in double precision.

Public names: `encode`, `decode`, `tensor_names`, `Tensors`.
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

from sbi_flows.artefact.strict import (
    expect_fields,
    expect_integer,
    expect_list,
    expect_number,
    expect_type,
)
from sbi_flows.core.errors import ArtefactError
from sbi_flows.prior import circular

Tensors = dict[str, np.ndarray]
"""Dict of arrays by name. Functions that encode an object add its arrays to the dict."""

_ARGUMENTS = {
    "AsymmetricLaplace": "loc scale asymmetry",
    "AsymmetricLaplaceQuantile": "loc scale quantile",
    "Beta": "concentration1 concentration0",
    "CategoricalLogits": "logits",
    "CategoricalProbs": "probs",
    "Cauchy": "loc scale",
    "Chi2": "df",
    "Circular": "low:base_dist",
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
"""Names of the arguments of each constructor. An entry is `argument`, or `argument:attribute` if
the object stores the argument in an attribute with another name."""

_MODULES = (dist, transforms, constraints, circular)
_CLASSES = {n: next(getattr(m, n) for m in _MODULES if hasattr(m, n)) for n in _ARGUMENTS}
_NAMES = {kind: name for name, kind in _CLASSES.items()}

_CONSTRAINTS = {
    name: getattr(constraints, name)
    for name in (
        *("circular", "nonnegative", "ordered_vector", "positive", "real", "real_vector"),
        *("simplex", "softplus_positive", "unit_interval"),
    )
}

MAX_STEPS = 1024
"""Maximum value of arguments that set the size of an array which a constructor computes: the number
of rows of a matrix, or the number of steps of a random walk."""

_SIZE_ARGUMENTS = {"dimension", "num_steps", "reinterpreted_batch_ndims"}
_INFINITE = {"inf": math.inf, "-inf": -math.inf}


def encode(name: str, value: Any, tensors: Tensors) -> Any:
    """Convert a distribution, or an argument of a distribution, to JSON data.

    Args:
        name: Name of the prior's site, for error messages.
        value: The distribution or argument.
        tensors: Tensors of the file. This function adds the arrays of `value`.

    Raises:
        ValueError: The class of the distribution, or of a part of it, is not in the table.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _encode_array(name, value, tensors)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and not math.isnan(value):
        return value if math.isfinite(value) else {"number": str(value)}
    if isinstance(value, list | tuple):
        return [encode(name, part, tensors) for part in value]
    kind = _NAMES.get(type(value))
    if kind is not None:
        pairs = [argument.split(":") for argument in _ARGUMENTS[kind].split()]
        arguments = {
            a: encode(name, getattr(value, at[-1] if at else a), tensors) for a, *at in pairs
        }
        return {"type": kind, "arguments": arguments}
    for constraint, known in _CONSTRAINTS.items():
        if value is known:
            return {"constraint": constraint}
    raise ValueError(f"{name}: {type(value).__name__} is not a numpyro class that can be saved")


def decode(name: str, value: Any, tensors: Mapping[str, Any]) -> Any:
    """Convert JSON data to a distribution.

    Args:
        name: Name of the prior's site, for error messages.
        value: The data.
        tensors: Arrays of the file by name; `jax.ShapeDtypeStruct` or tracers are accepted.

    Raises:
        ArtefactError: The data refer to an unknown class or a missing tensor, or the class does
            not accept the arguments.
    """
    return _decode(name, "", value, tensors)


def tensor_names(value: Any) -> list[str]:
    """Return the names of all tensors to which the JSON data refer."""
    if isinstance(value, dict):
        names = [value["tensor"]] if isinstance(value.get("tensor"), str) else []
        return names + [name for part in value.values() for name in tensor_names(part)]
    if isinstance(value, list):
        return [name for part in value for name in tensor_names(part)]
    return []


def _encode_array(name: str, value: Any, tensors: Tensors) -> dict[str, Any]:
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) or value.dtype.kind not in "biufV":
        raise ValueError(f"{name}: an array of {value.dtype} cannot be saved")
    tensor = f"prior/{len(tensors)}"
    tensors[tensor] = np.asarray(value)
    return {"tensor": tensor, "numpy": not isinstance(value, jax.Array)}


def _decode(name: str, argument: str, value: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        parts = [_decode(name, argument, part, tensors) for part in expect_list(name, value, 1024)]
        return tuple(parts) if all(isinstance(part, int) for part in parts) else parts
    if isinstance(value, int) and not isinstance(value, bool) and argument in _SIZE_ARGUMENTS:
        return expect_integer(f"{name}: {argument}", value, 0, MAX_STEPS)
    if not isinstance(value, dict):
        return value if argument == "sample_method" else expect_number(f"{name}: {argument}", value)
    if "tensor" in value:
        tensor, is_numpy = expect_fields(name, value, "tensor", "numpy")
        return _array(name, tensor, is_numpy, tensors)
    if "number" in value or "constraint" in value:
        (key,) = value
        known: dict[str, Any] = _INFINITE if key == "number" else _CONSTRAINTS
        return _named(name, known, value[key])
    kind, values = expect_fields(name, value, "type", "arguments")
    constructor = _named(name, _CLASSES, kind)
    expected = [argument.split(":")[0] for argument in _ARGUMENTS[kind].split()]
    pairs = zip(expected, expect_fields(f"{name}: {kind}", values, *expected), strict=True)
    arguments = {n: _decode(name, n, v, tensors) for n, v in pairs}
    try:
        return constructor(**arguments)
    except (ValueError, TypeError, AttributeError, AssertionError, IndexError) as error:
        raise ArtefactError(f"{name}: {kind}: {str(error)[:200]}") from None


def _named(name: str, known: Mapping[str, Any], kind: Any) -> Any:
    """Return the entry of the table `known` for the name `kind`, which was read from a file."""
    if not isinstance(kind, str) or kind not in known:
        raise ArtefactError(f"{name}: expected one of {sorted(known)}, got {kind!r:.80}")
    return known[kind]


def _array(name: str, tensor: Any, is_numpy: Any, tensors: Mapping[str, Any]) -> Any:
    if not isinstance(tensor, str) or tensor not in tensors:
        raise ArtefactError(f"{name}: expected a tensor of the file, got {tensor!r:.80}")
    array = tensors[tensor]
    if not isinstance(array, np.ndarray):
        return array
    if expect_type(name, is_numpy, bool, "a truth value"):
        return array if array.ndim else array[()]
    return jnp.asarray(array)
