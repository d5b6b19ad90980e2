"""Distilled posteriors: they draw what their teachers draw, in fewer evaluations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.densities.distilled import Distilled
from sbi_flows.densities.samplers import step_toward, target_of_step
from tests.cases import unchecked

BRIEF = sf.Training(max_epochs=40, batch_size=64, learning_rate=3e-3, ema_decay=0.99)
FLOWS = {
    "FlowMatching": sf.FlowMatching(network=sf.Film(width=32, blocks=1, dropout=0.0)),
    "Diffusion": sf.Diffusion(network=sf.Film(width=32, blocks=1, dropout=0.0)),
}
PRIOR = dist.Uniform(-2.0, 2.0).expand([1])
X = jnp.array([1.0])


def folded(key, theta):
    return jnp.abs(theta) + 0.2 * jax.random.normal(key, theta.shape)


@pytest.fixture(autouse=True)
def fewer_paths(monkeypatch):
    from sbi_flows.estimators import distillation

    monkeypatch.setattr(distillation, "MAX_PATHS", 1_024)


@pytest.fixture(scope="module")
def simulations():
    return sf.simulate(jax.random.key(0), PRIOR, folded, 1_000, progress=False)


@pytest.fixture(scope="module")
def teachers(simulations):
    @functools.cache
    def fitted(name):
        npe = sf.NPE(PRIOR, FLOWS[name], training=BRIEF, members=2)
        return npe.fit(jax.random.key(1), simulations, progress=False)[0]

    return fitted


@pytest.fixture(scope="module")
def teacher(teachers):
    return teachers("FlowMatching")


def test_an_aim_is_where_its_step_leads():
    z, after = jax.random.normal(jax.random.key(0), (2, 5, 3))
    now, then = jnp.array(0.3), jnp.array(1.2)
    np.testing.assert_allclose(
        step_toward(z, target_of_step(z, after, now, then), now, then), after, rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("FlowMatching", 1), ("Diffusion", 3)])
def test_draws_are_those_of_the_teacher_and_densities_too(teachers, simulations, name, steps):
    teacher = teachers(name)
    fast, errors = sf.distil(
        jax.random.key(2), teacher, simulations, steps=steps, training=BRIEF, progress=False
    )
    assert errors.shape == (40, 2)
    # of the weights that are kept
    assert np.all(errors[-1] < 0.6 * errors[0])
    key = jax.random.key(3)
    slow_draws, draws = (np.asarray(p.sample(key, X, 2_000))[:, 0] for p in (teacher, fast))
    # two modes of the same weight, width and place
    for side in (-1, 1):
        slow, quick = (d[np.sign(d) == side] for d in (slow_draws, draws))
        assert len(quick) == pytest.approx(len(slow), abs=120)
        assert quick.mean() == pytest.approx(slow.mean(), abs=0.06)
        assert quick.std() == pytest.approx(slow.std(), rel=0.25)
    np.testing.assert_allclose(
        fast.log_prob(draws[:5, None], X), teacher.log_prob(draws[:5, None], X), rtol=1e-5
    )


@pytest.mark.slow
def test_the_same_key_gives_the_same_student(teacher, simulations):
    brief = dataclasses.replace(BRIEF, max_epochs=1)

    def draws():
        key = jax.random.key(4)
        fast, _ = sf.distil(key, teacher, simulations, training=brief, progress=False)
        return fast.sample(jax.random.key(5), X, 20)

    first, again = draws(), draws()
    np.testing.assert_array_equal(first, again)


@pytest.mark.slow
def test_the_rows_of_the_teacher_and_of_the_distillation_are_known(teacher, simulations):
    more = sf.simulate(jax.random.key(9), PRIOR, folded, 100, progress=False)
    brief = dataclasses.replace(BRIEF, max_epochs=1)
    fast, _ = sf.distil(jax.random.key(4), teacher, more, training=brief, progress=False)
    assert (teacher.used_rows.count, fast.used_rows.count) == (1_000, 1_100)
    assert fast.used_rows.overlap(simulations, teacher.prior) == 1_000
    assert fast.used_rows.overlap(more, teacher.prior) == 100


@pytest.mark.slow
def test_an_interrupt_keeps_what_was_learned(simulations, teacher, monkeypatch):
    from sbi_flows.estimators import distillation

    epoch, calls = distillation._epoch, []

    def interrupted(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return epoch(*arguments)

    monkeypatch.setattr(distillation, "_epoch", interrupted)
    brief = dataclasses.replace(BRIEF, max_epochs=2)
    fast, errors = sf.distil(jax.random.key(2), teacher, simulations, training=brief)
    assert errors.shape == (1, 2)
    assert fast.sample(jax.random.key(3), X, 7).shape == (7, 1)


@pytest.mark.slow
def test_an_interrupt_before_anything_was_learned_is_one(simulations, teacher, monkeypatch):
    from sbi_flows.estimators import distillation

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sf.distil(jax.random.key(2), teacher, simulations, training=BRIEF)


@pytest.mark.slow
def test_what_is_no_continuous_flow_is_refused(simulations, teacher):
    spline = sf.NSF(transforms=1, hidden=(8,), context_width=8, context_blocks=1)
    brief = sf.Training(max_epochs=1)
    npe = sf.NPE(PRIOR, spline, training=brief, members=1)
    posterior, _ = npe.fit(jax.random.key(1), simulations, progress=False)
    with pytest.raises(ValueError, match=r"posterior of sf\.FlowMatching .*, got NSF"):
        sf.distil(jax.random.key(2), posterior, simulations)
    failed = sf.Simulations(simulations.theta, jnp.full_like(simulations.x, jnp.nan))
    with pytest.raises(ValueError, match="simulations: expected valid ones, got none of 1000"):
        sf.distil(jax.random.key(2), teacher, failed)
    with pytest.raises(ValueError, match="steps: expected a whole number of at least 1, got 0"):
        sf.distil(jax.random.key(2), teacher, simulations, steps=0)
    with pytest.raises(ValueError, match=r"teacher: expected sf\.FlowMatching.*, got NSF"):
        unchecked(Distilled, teacher=spline)
    npe = sf.NPE(PRIOR, Distilled(teacher=FLOWS["FlowMatching"]), training=brief, members=1)
    with pytest.raises(ValueError, match=r"got Distilled, which sf\.distil makes"):
        npe.fit(jax.random.key(1), simulations, progress=False)
