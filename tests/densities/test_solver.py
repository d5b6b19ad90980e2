"""The ODE solver of continuous flows."""

import diffrax
import jax
import jax.numpy as jnp

import sbi_flows as sf


def test_the_work_of_a_solve_is_counted_or_not_known():
    """Compare with the evaluations that the field itself counts."""
    for method, known in (
        (diffrax.Bosh3(), True),
        (diffrax.Heun(), True),
        (diffrax.Kvaerno3(), False),
    ):
        counted = []

        def field(angle, z, _, counted=counted):
            jax.debug.callback(lambda _: counted.append(1), angle)
            return -z

        solver = sf.Solver(method=method)
        _, stats = solver.solve(field, jnp.ones(2), None, (0.0, 1.0))
        jax.effects_barrier()
        assert int(stats.evaluations) == (len(counted) if known else -1)
