"""Posteriors of other libraries are used through the adapter as if they were of this one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sbi_flows as sf
from sbi_flows.posteriors.adapter import ExternalPosterior, as_posterior, single_shape

KEY = jax.random.key(0)
X = jnp.array([0.4, -0.7])


@pytest.fixture
def external(gaussian):
    return as_posterior(gaussian(), single_shape(X))


class SamplesOnly:
    """A prior and draws, without densities."""

    def __init__(self, posterior):
        self.prior, self.sample = posterior.prior, posterior.sample


class WithoutJointCall(SamplesOnly):
    """Draws and densities, by separate calls."""

    def __init__(self, posterior):
        super().__init__(posterior)
        self.log_prob = posterior.log_prob


def test_results_are_those_of_the_users_object(gaussian, external):
    batch = jnp.stack([X, 2.0 * X])
    for x in (X, batch):
        draws, log_prob = gaussian().sample_and_log_prob(KEY, x, 5)
        np.testing.assert_array_equal(external.sample(KEY, x, 5), draws)
        np.testing.assert_allclose(external.log_prob(draws, x), log_prob, rtol=1e-6)
        found = external.sample_and_log_prob(KEY, x, 5)
        np.testing.assert_array_equal(found[0], draws)
        np.testing.assert_allclose(found[1], log_prob, rtol=1e-6)
    theta = jnp.zeros((2, 2))
    np.testing.assert_allclose(
        external.log_prob(theta, batch), gaussian().log_prob(theta, batch), rtol=1e-6
    )


def test_the_joint_call_is_optional(gaussian):
    posterior = as_posterior(WithoutJointCall(gaussian()), single_shape(X))
    draws, log_prob = posterior.sample_and_log_prob(KEY, X, 5)
    np.testing.assert_allclose(log_prob, gaussian().log_prob(draws, X), rtol=1e-6)


def test_a_posterior_without_densities_can_be_sampled_only(gaussian, simulator):
    posterior = SamplesOnly(gaussian())
    sims = sf.simulate(KEY, posterior.prior, simulator, 60, progress=False)
    assert sf.sbc(KEY, posterior, sims, draws=20).uniform.shape == (60, 2)
    with pytest.raises(ValueError, match="expected an object with log_prob, got SamplesOnly"):
        sf.coverage(KEY, posterior, sims, draws=20)


def test_what_is_not_known_of_it(external):
    assert external.typicality is None and external.spaces(X) == ()
    assert not external.has_own_regions and not external.needs_ode
    assert external.origin is external and external.is_single(X)
    with pytest.raises(ValueError, match="expected one with credible regions of its own"):
        external.credible_levels(KEY, jnp.zeros((1, 2)), X[None])
    with pytest.raises(ValueError, match=r"expected an sf\.Posterior to save, got Gaussian"):
        external.to_saved()


def test_a_posterior_of_this_library_is_returned_unchanged(external):
    assert as_posterior(external, single_shape(X)) is external
    assert isinstance(external, ExternalPosterior)


def test_other_objects_are_refused():
    past_types = as_posterior.__wrapped__ if hasattr(as_posterior, "__wrapped__") else as_posterior
    with pytest.raises(ValueError, match="expected an object with prior and sample, got int"):
        past_types(3, single_shape(X))
