"""Priors, bijectors and densities on which the generic tests run, by name."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import distrax
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jax import Array
from numpyro.distributions import transforms

import sbi_flows as sf
from sbi_flows.densities.bijectors import (
    Autoregressive,
    Coupling,
    LULinear,
    RationalQuadraticSpline,
    Repeated,
    Rotation,
    TruncatedAutoregression,
    lu,
)
from sbi_flows.networks import Conditioned, Conditioner


def perturbed(key: Array, tree: Any, scale: float = 0.3) -> Any:
    """Add normal noise to every array of a tree, so that no array keeps its initial value."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves) + 1)
    noisy = [
        leaf + scale * jax.random.normal(k, leaf.shape, leaf.dtype)
        for leaf, k in zip(leaves, keys[1:], strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def unchecked(kind: type, *args: Any, **settings: Any) -> Any:
    """Construct an object without the type checks of the tests, which come before our own."""
    instance = object.__new__(kind)
    inspect.unwrap(kind.__init__)(instance, *args, **settings)
    return instance


def hierarchy() -> None:
    """Sample from a numpyro model whose second site depends on the first."""
    level = numpyro.sample("level", dist.Normal(1.0, 2.0))
    with numpyro.plate("group", 2):
        numpyro.sample("effect", dist.Normal(level, 0.5))
    numpyro.sample("noise", dist.HalfNormal(1.5))


PRIORS: dict[str, Callable[[], Any]] = {
    "uniform": lambda: dist.Uniform(-2.0, 5.0).expand([2]),
    "uniform, own faces": lambda: dist.Uniform(jnp.array([0.1, -3.0]), jnp.array([0.3, 7.0])),
    "normal": lambda: dist.Normal(1.0, 3.0),
    "lognormal": lambda: dist.LogNormal(0.5, 0.7).expand([2]),
    "negative lognormal": lambda: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0),
        [
            transforms.ExpTransform(),
            transforms.AffineTransform(1.0, -2.0, domain=dist.constraints.positive),
        ],
    ),
    "truncated below": lambda: dist.TruncatedNormal(0.05, 0.05, low=0.0),
    "truncated on both sides": lambda: dist.TruncatedNormal(1.0, 0.5, low=0.0, high=1.2),
    "half normal": lambda: dist.HalfNormal(2.0).expand([2]).to_event(1),
    "half Cauchy": lambda: dist.HalfCauchy(1.0),
    "exponential": lambda: dist.Exponential(4.0),
    "beta": lambda: dist.Beta(2.0, 3.0),
    "gamma": lambda: dist.Gamma(2.0, 3.0),
    "Student t": lambda: dist.StudentT(3.0, 1.0, 2.0),
    "Weibull": lambda: dist.Weibull(1.0, 2.0),
    "correlated normal": lambda: dist.MultivariateNormal(
        jnp.array([1.0, -1.0]), jnp.array([[2.0, 0.8], [0.8, 1.0]])
    ),
    "simplex": lambda: dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])),
    "Cholesky factor": lambda: dist.LKJCholesky(3, 2.0),
    "ordered": lambda: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0).expand([3]).to_event(1), transforms.OrderedTransform()
    ),
    "dict": lambda: {
        "rate": dist.LogNormal(0.0, 1.0),
        "p": dist.Uniform(0.0, 1.0).expand([2, 2]),
        "offset": dist.Normal(jnp.array([0.0, 5.0]), 1.0),
    },
    "model": lambda: hierarchy,
}

FREE: dict[str, tuple[int, ...]] = {"simplex": (0, 1), "Cholesky factor": (3, 6, 7)}
"""Indices of free entries, for supports with fewer degrees of freedom than entries."""


@dataclasses.dataclass(frozen=True)
class BijectorCase:
    """A bijector as a function of its arrays.

    Attributes:
        params: Function `(key, dim) -> arrays`; no array has its initial value.
        build: Function `(arrays, dim) -> bijector` over vectors of length `dim`.
        dims: Lengths of vectors to test.
        width: The forward map is tested on (-width, width).
        free: Indices of the free entries of the output; None for all.
    """

    params: Callable[[Array, int], Any]
    build: Callable[[Any, int], distrax.Bijector]
    dims: tuple[int, ...] = (3, 1, 2, 5)
    width: float = 3.0
    free: tuple[int, ...] | None = None


CONTEXT = (0.3, -0.7)


def _spline(params: Array) -> distrax.Bijector:
    return RationalQuadraticSpline(params, 4.0)


class EachEntry(distrax.Bijector):
    """Spline over vectors; all rows of a batch share its parameters (P, D)."""

    def __init__(self, params: Array) -> None:
        super().__init__(event_ndims_in=1)
        self._params = params

    def _map(self, x: Array, method: str) -> tuple[Array, Array]:
        params = jnp.expand_dims(self._params, tuple(range(1, x.ndim)))
        out, log_det = getattr(_spline(params), method)(x)
        return out, jnp.sum(log_det, axis=-1)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        return self._map(x, "forward_and_log_det")

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        return self._map(y, "inverse_and_log_det")


def _affine(params: Array) -> distrax.Bijector:
    return distrax.ScalarAffine(params[0], log_scale=jnp.tanh(params[1]))


def _network(key: Array, inputs: int, outputs: int, count: int, *, masked: bool) -> Any:
    module = Conditioner(
        inputs, outputs, count, context_dim=2, hidden=(8, 8), masked=masked, rngs=nnx.Rngs(key)
    )
    return nnx.split(module)


def _linear_layer(arrays: tuple[Array, Array]) -> list[distrax.Bijector]:
    lower, upper = arrays
    return [LULinear(lu(lower, upper, jnp.diagonal(lower)))]


def autoregressive(transformer: Callable, count: int) -> BijectorCase:
    """Return the case of a masked autoregressive layer, given one context."""

    def params(key: Array, dim: int) -> Any:
        rest = _network(key, dim - 1, dim - 1, count, masked=True) if dim > 1 else None
        return perturbed(key, (jnp.zeros((count, 1)), rest))

    def build(params: Any, dim: int) -> distrax.Bijector:
        if params[1] is None:
            return Autoregressive(params[0], None, transformer)
        network = nnx.merge(*params[1])
        rest = Conditioned(network, network.encode_context(jnp.asarray(CONTEXT)))
        return Autoregressive(params[0], rest, transformer)

    return BijectorCase(params, build)


def coupling(transformer: Callable, count: int) -> BijectorCase:
    """Return the case of a coupling layer, given one context."""

    def params(key: Array, dim: int) -> Any:
        return perturbed(key, _network(key, dim // 2, dim - dim // 2, count, masked=False))

    def build(params: Any, dim: int) -> distrax.Bijector:
        network = nnx.merge(*params)
        return Coupling(
            Conditioned(network, network.encode_context(jnp.asarray(CONTEXT))),
            transformer,
            dim // 2,
        )

    return BijectorCase(params, build, dims=(3, 2, 5))


def _truncated_params(key: Array, dim: int) -> Any:
    # small scales (nearly affine) to large ones (nearly uniform); means inside and outside the box
    mean, log_scale = jnp.linspace(0.5, -4.0, dim), jnp.linspace(-4.0, 4.0, dim)
    return perturbed(key, (mean, jnp.zeros((dim, dim)), log_scale))


def _truncated(params: Any, dim: int) -> distrax.Bijector:
    return TruncatedAutoregression(*params, tuple(i % 2 == 0 for i in range(dim)))


class Support(distrax.Bijector):
    """Map of a prior from standard coordinates (*, d) to its support (*, D), as a bijector."""

    def __init__(self, prior: sf.Prior) -> None:
        super().__init__(event_ndims_in=1)
        self._prior = prior

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        theta = self._prior.from_standard(x)
        return theta, self._prior.standard_log_det(x, theta)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        x = self._prior.to_standard(y)
        return x, -self._prior.standard_log_det(x, y)


def support(name: str) -> BijectorCase:
    """Return the case of the map from standard coordinates to the support of one of PRIORS."""
    return BijectorCase(
        lambda key, dim: (),
        lambda params, dim: Support(prior(name)),
        dims=(standard_dim(name),),
        width=1.7,
        free=FREE.get(name),
    )


def prior(name: str) -> sf.Prior:
    """Return one of PRIORS in the current precision; it is built once, outside of any trace."""
    return _prior(name, jax.config.jax_enable_x64)


@functools.cache
def _prior(name: str, x64: bool) -> sf.Prior:
    with jax.ensure_compile_time_eval():
        return sf.as_prior(PRIORS[name]())


@functools.cache
def standard_dim(name: str) -> int:
    """Return the number of standard coordinates of one of PRIORS."""
    with jax.numpy_rank_promotion("allow"):
        return prior(name).standard_dim


BIJECTORS: dict[str, BijectorCase] = {
    "spline": BijectorCase(
        lambda key, dim: jax.random.normal(key, (3 * 6 - 1, dim)),
        lambda params, dim: EachEntry(params),
        width=4.5,
    ),
    "autoregressive spline": autoregressive(_spline, 3 * 4 - 1),
    "autoregressive affine": autoregressive(_affine, 2),
    "coupling spline": coupling(_spline, 3 * 4 - 1),
    "coupling affine": coupling(_affine, 2),
    "LU-linear": BijectorCase(
        lambda key, dim: perturbed(key, (jnp.eye(dim), jnp.eye(dim), jnp.zeros(dim))),
        lambda params, dim: LULinear(lu(*params)),
    ),
    "repeated layers": BijectorCase(
        lambda key, dim: perturbed(key, tuple(jnp.zeros((2, dim, dim)) for _ in range(2))),
        lambda params, dim: Repeated(_linear_layer, params),
    ),
    "truncated normal": BijectorCase(_truncated_params, _truncated),
    "rotation": BijectorCase(
        lambda key, dim: jax.random.normal(key, (dim,)),
        lambda params, dim: Rotation(params, tuple(i != 1 for i in range(dim))),
        width=1.7,
    ),
}

DENSITIES: dict[str, Any] = {
    "NSF": sf.NSF(transforms=2, bins=4, hidden=(16, 16), context_width=8, context_blocks=1),
    "coupling NSF": sf.NSF(
        transforms=2, bins=4, hidden=(16, 16), context_width=8, context_blocks=1, coupling=True
    ),
    "NSF without trunk": sf.NSF(transforms=2, bins=4, hidden=(16,), context_width=0),
    "MAF": sf.MAF(transforms=2, hidden=(16, 16), context_width=8, context_blocks=1),
    "coupling MAF": sf.MAF(
        transforms=2, hidden=(16, 16), context_width=8, context_blocks=1, coupling=True
    ),
    "mixture": sf.GaussianMixture(components=3, width=16, blocks=1),
}
