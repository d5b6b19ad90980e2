"""Every continuous distribution of numpyro works as a prior, or is refused by a true sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.prior import trial
from tests.compilations import count_compilations

# numpyro promotes ranks in many distributions and transforms
pytestmark = pytest.mark.promotes

SIZES = (1e-3, 1.0, 1e3)
HALF = jnp.array([0.5, 0.5])
PAIR = jnp.array([[1.0, 0.6], [0.6, 1.0]])

SCALED = {  # distributions of a scale s
    "AsymmetricLaplace": lambda s: dist.AsymmetricLaplace(s, s, 2.0),
    "AsymmetricLaplaceQuantile": lambda s: dist.AsymmetricLaplaceQuantile(s, s, 0.3),
    "CAR": lambda s: dist.CAR(
        s * jnp.ones(2), 0.3, 1.0 / s**2, jnp.array([[0.0, 1.0], [1.0, 0.0]])
    ),
    "Cauchy": lambda s: dist.Cauchy(s, s),
    "CirculantNormal": lambda s: dist.CirculantNormal(
        jnp.zeros(3), covariance_row=s**2 * jnp.array([1.0, 0.3, 0.3])
    ),
    "DoublyTruncatedPowerLaw": lambda s: dist.DoublyTruncatedPowerLaw(-1.5, s, 10.0 * s),
    "Dagum": lambda s: dist.Dagum(2.0, s, 3.0),
    "Exponential": lambda s: dist.Exponential(1.0 / s),
    "FoldedDistribution": lambda s: dist.FoldedDistribution(dist.Normal(s, s)),
    "GaussianRandomWalk": lambda s: dist.GaussianRandomWalk(s, 4),
    "GaussianStateSpace": lambda s: dist.GaussianStateSpace(
        3, 0.5 * jnp.eye(2), scale_tril=s * jnp.eye(2)
    ),
    "Gumbel": lambda s: dist.Gumbel(s, s),
    "HalfCauchy": lambda s: dist.HalfCauchy(s),
    "HalfNormal": lambda s: dist.HalfNormal(s),
    "Laplace": lambda s: dist.Laplace(s, s),
    "LeftTruncated": lambda s: dist.TruncatedCauchy(0.0, s, low=0.5 * s),
    "Levy": lambda s: dist.Levy(s, s),
    "LogUniform": lambda s: dist.LogUniform(s, 1e3 * s),
    "Logistic": lambda s: dist.Logistic(s, s),
    "LowRankMultivariateNormal": lambda s: dist.LowRankMultivariateNormal(
        jnp.zeros(3), s * jnp.ones((3, 1)), s**2 * 0.1 * jnp.ones(3)
    ),
    "LowerTruncatedPowerLaw": lambda s: dist.LowerTruncatedPowerLaw(-2.5, s),
    "MatrixNormal": lambda s: dist.MatrixNormal(
        jnp.zeros((2, 2)), s * jnp.linalg.cholesky(PAIR), jnp.eye(2)
    ),
    "MixtureGeneral": lambda s: dist.MixtureGeneral(
        dist.Categorical(HALF), [dist.Normal(0.0, s), dist.StudentT(5.0, s, 3.0 * s)]
    ),
    "MixtureSameFamily": lambda s: dist.MixtureSameFamily(
        dist.Categorical(HALF), dist.Normal(s * jnp.array([-4.0, 4.0]), s)
    ),
    "MultivariateNormal": lambda s: dist.MultivariateNormal(s * jnp.ones(2), s**2 * PAIR),
    "MultivariateStudentT": lambda s: dist.MultivariateStudentT(
        4.0, jnp.zeros(2), s * jnp.linalg.cholesky(PAIR)
    ),
    "Pareto": lambda s: dist.Pareto(s, 3.0),
    "RightTruncated": lambda s: dist.TruncatedNormal(s, s, high=-s),
    "SoftLaplace": lambda s: dist.SoftLaplace(s, s),
    "TwoSidedTruncated": lambda s: dist.TruncatedNormal(s, s, low=-s, high=0.5 * s),
    "Wishart": lambda s: dist.Wishart(4.0, s * PAIR),
    "WishartCholesky": lambda s: dist.WishartCholesky(4.0, scale_tril=s * jnp.eye(2)),
    "InverseWishartCholesky": lambda s: dist.InverseWishartCholesky(4.0, scale_tril=s * jnp.eye(2)),
    "InverseWishart": lambda s: dist.InverseWishart(4.0, s * PAIR),
    "ZeroSumNormal": lambda s: dist.ZeroSumNormal(s, (3,)),
}

SHAPED = {  # distributions of a shape parameter a
    "Beta": lambda a: dist.Beta(a, a),
    "BetaProportion": lambda a: dist.BetaProportion(0.3, a),
    "Chi2": lambda a: dist.Chi2(a),
    "Dirichlet": lambda a: dist.Dirichlet(a * jnp.array([1.0, 2.0, 3.0])),
    "Gamma": lambda a: dist.Gamma(a, 2.0),
    "Gompertz": lambda a: dist.Gompertz(a, 1.0),
    "InverseGamma": lambda a: dist.InverseGamma(a, 2.0),
    "Kumaraswamy": lambda a: dist.Kumaraswamy(a, 2.0),
    "LKJ": lambda a: dist.LKJ(3, a),
    "LKJCholesky": lambda a: dist.LKJCholesky(3, a),
    "LeftTruncatedLogistic": lambda a: dist.LeftTruncatedDistribution(dist.Logistic(0.0, 1.0), a),
    "LeftTruncatedGamma": lambda a: dist.LeftTruncatedGamma(dist.Gamma(2.0, 1.0), a),
    "TwoSidedTruncatedGamma": lambda a: dist.TwoSidedTruncatedGamma(
        dist.Gamma(2.0, 1.0 / a), 0.5 * a, 3.0 * a
    ),
    "HurdleGamma": lambda a: dist.HurdleGamma(0.3, a, 1.0),
    "TruncatedPolyaGamma": lambda a: dist.TruncatedPolyaGamma(batch_shape=()),
    "ParetoShape": lambda a: dist.Pareto(1.0, a),
    "RelaxedBernoulli": lambda a: dist.RelaxedBernoulliLogits(a, 0.3),
    "SineBivariateVonMises": lambda a: dist.SineBivariateVonMises(0.0, 0.0, 1.0 + a, 2.0, 0.1),
    "StudentT": lambda a: dist.StudentT(a, 0.0, 1.0),
    "Weibull": lambda a: dist.Weibull(1.0, a),
}

QUICK = {"Laplace", "HalfCauchy", "MultivariateNormal", "Weibull", "ZeroSumNormal"}
CASES = [
    pytest.param(make, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
    for name, make in {**SCALED, **SHAPED}.items()
]


ENDS = [
    *(dist.Gamma(a, 2.0) for a in (1.0, 50.0)),
    *(dist.Beta(a, b) for a in (1.0, 1000.0) for b in (1.0, 1000.0)),
    *(dist.StudentT(df, 0.0, 1.0) for df in (1.0, 4.0)),
    *(dist.TruncatedNormal(0.0, 1.0, low=z) for z in (-3.9, 3.9)),
    *(dist.TruncatedNormal(0.0, 1.0, low=0.95, high=z) for z in (1.06, 9.0)),
    *(dist.TruncatedNormal(0.0, 1.0, low=z, high=-0.95) for z in (-1.06, -9.0)),
    dist.TruncatedNormal(0.0, 1.0, low=-9.0, high=9.0),
]


@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize("given", ENDS)
def test_distributions_without_a_trial_would_pass_it(given):
    prior = sf.as_prior(given)
    tested = trial._tested(prior)
    assert tested.site_kinds == prior.site_kinds and tested.whitening is None


def is_at_edge(y: jax.Array) -> bool:
    """Return whether more than a tenth of the draws have the largest or the smallest value."""
    edges = [edge(np.asarray(y), axis=0) for edge in (np.min, np.max)]
    return any(np.max(np.mean(np.asarray(y) == edge, axis=0)) > 0.1 for edge in edges)


def problems(given: dist.Distribution) -> str:
    """Return what is wrong with a prior, or with the sentence that refuses it."""
    try:
        prior = sf.as_prior(given)
    except ValueError as error:
        has_advice = "; " in str(error) or "with a density that can be drawn from" in str(error)
        is_sentence = "prior site 'theta': expected" in str(error) and has_advice
        return "" if is_sentence else f"refused by {error}"
    theta = prior.sample(jax.random.key(9), 2000)
    y = prior.to_standard(theta)
    back = prior.from_standard(y)
    distance = np.abs(theta - np.median(theta, axis=0))
    sd = np.median(distance, axis=0) / 0.67
    changed = np.abs(back - theta) / (sd + 10.0 * distance + 1e-2 * np.abs(theta) + 1e-30)
    log_prob = prior.log_prob(theta)
    # coordinates of draws that rounding has made equal are not those of a continuous distribution
    is_smooth = not is_at_edge(y)
    found = {
        "outside": np.mean(~np.asarray(prior.contains(theta))) > 0,
        "density": np.mean(~np.isfinite(log_prob)) > 0,
        "infinite": np.mean(~np.isfinite(y)) > 0,
        "changed": np.mean(changed > 1e-4) > 0.01,
        "mean": is_smooth and np.max(np.abs(np.mean(np.clip(y, -6, 6), axis=0))) > 0.3,
        "sd": is_smooth and not np.all(np.abs(np.log(np.std(np.clip(y, -6, 6), axis=0))) < 0.4),
    }
    return ", ".join(name for name, is_bad in found.items() if is_bad)


@pytest.mark.parametrize("make", CASES)
def test_a_distribution_works_or_is_refused_by_a_sentence(make):
    assert {size: problems(make(size)) for size in SIZES} == dict.fromkeys(SIZES, "")


class Triangle(dist.Uniform):
    """Uniform square with a density in a triangle only; its support is that of the square."""

    def __init__(self) -> None:
        super().__init__(jnp.zeros(2), jnp.ones(2))

    def log_prob(self, value, intermediates=None):
        inside = value[..., :1] < value[..., 1:]
        return jnp.where(inside, super().log_prob(value), -jnp.inf)


class Understated(dist.Normal):
    """Negative half of a normal, with support R."""

    def sample(self, key, sample_shape=()):
        return -jnp.abs(super().sample(key, sample_shape))

    def log_prob(self, value, intermediates=None):
        return jnp.where(value < 0.0, super().log_prob(value) + jnp.log(2.0), -jnp.inf)


class Unfinished(dist.Distribution):
    """Distribution without a sampler."""

    support = dist.constraints.real

    def log_prob(self, value):
        return -jnp.abs(value)


def two_intervals() -> dist.MixtureGeneral:
    return dist.MixtureGeneral(
        dist.Categorical(HALF), [dist.Uniform(0.0, 1.0), dist.Uniform(5.0, 6.0)]
    )


def model() -> None:
    numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.sample("b", two_intervals())


REFUSED = {
    "an atom": (
        lambda: dist.HurdleGamma(0.3, 2.0, 1.0),
        "'theta': expected a distribution with a density .*, got HurdleGamma",
    ),
    "two intervals": (
        two_intervals,
        r"'theta': expected draws inside the support that MixtureGeneral states \(Interval\), got "
        r"(4|5)\d% of them outside, for example 5\.",
    ),
    "in a dict": (lambda: {"a": two_intervals()}, "'a': expected draws inside the support"),
    "in a model": (lambda: model, "'b': expected draws inside the support"),
    "triangle": (Triangle, "draws with a finite log density, got .* 47% of the draws have"),
    "understated": (
        lambda: Understated(0.0, 1.0),
        r"everywhere in the stated support, got NaN or infinity at \d+% .* sf\.constrained",
    ),
    "sphere": (
        lambda: dist.ProjectedNormal(jnp.array([1.0, 0.0])),
        "'theta': expected a support with a transform .*, got Sphere of ProjectedNormal; ",
    ),
    "no sampler": (Unfinished, "'theta': expected a distribution with .* without `sample`; "),
    "underflow": (
        lambda: dist.Gamma(1e-4, 1.0),
        r"can represent, got Gamma: rounding moves \d+% of its draws to an edge .* logarithm",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_prior_that_misstates_itself_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        sf.as_prior(make())


def test_an_equal_prior_compiles_nothing_for_its_trial():
    sf.as_prior({"a": dist.Laplace(0.0, 1.0), "b": dist.HalfNormal(1.0)})
    with count_compilations() as compiled:
        sf.as_prior({"a": dist.Laplace(0.0, 2.0), "b": dist.HalfNormal(3.0)})
    assert compiled == []


def test_a_trial_ignores_the_users_debugging_settings():
    with jax.debug_nans(True), jax.numpy_rank_promotion("raise"):
        sf.as_prior(dist.MultivariateStudentT(3.0, jnp.zeros(2), jnp.eye(2)))
