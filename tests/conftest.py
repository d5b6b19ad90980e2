"""Settings of every test session: strict JAX, few threads, a compilation cache, no display."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

from tests.compiler import quicker_to_compile

# read when JAX, BLAS and matplotlib are imported; one thread each, as the workers fill the cores
# and no optimisation by the compiler, which costs more time than it saves in programs this small
os.environ["XLA_FLAGS"] = (
    "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0 "
    f"{quicker_to_compile()} {os.environ.get('XLA_FLAGS', '')}"
)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the workers share a GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import jax
import pytest

from benchmarks.suite.memory import drop_programs

CACHE = Path(__file__).parents[1] / ".cache" / "jax"

jax.config.update("jax_numpy_rank_promotion", "raise")
# compile time dominates the tests: a second run finds most programs compiled
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# no deadline, as the first example of a shape compiles; the same examples in every run
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, max_examples=20, database=None
)
hypothesis.settings.load_profile("tests")


SLOW_EXAMPLES = (
    "sbi_flows.posteriors.composed.",
    "sbi_flows.posteriors.conformal.",
    "sbi_flows.diagnostics.local.",
    "sbi_flows.observations.misspecification.",
    "sbi_flows.diagnostics.predictive.",
    "sbi_flows.diagnostics.sensitivity_to_data.",
    "sbi_flows.diagnostics.sensitivity_to_prior.",
    "sbi_flows.estimators.distillation.",
    "sbi_flows.estimators.emulator.",
    "sbi_flows.estimators.truncated.",
    "sbi_flows.posteriors.recalibrated.",
    "sbi_flows.simulations.validity.",
    "sbi_flows.diagnostics.anomalies.",
    "sbi_flows.diagnostics.learning_curve.",
    "sbi_flows.networks.embeddings.fusion.",
    "sbi_flows.networks.embeddings.set_transformer.",
    "simulators.gallery.influenza.",
    "simulators.gallery.lynx_hare_fit.",
    "simulators.adapters.mcmc.",
    "simulators.adapters.numpyro_model.",
)
"""Modules whose examples fit or compile for long."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow examples, which cannot do so themselves, and tests that run before a release.

    Of a slow test with three or more cases, one case in three runs at every change, the same case
    in all tests of a file, which may share a fixture; the others run before a release.
    """
    for item in items:
        if isinstance(item, pytest.DoctestItem) and item.name.startswith(SLOW_EXAMPLES):
            item.add_marker(pytest.mark.slow)
        elif item.get_closest_marker("release"):
            item.add_marker(pytest.mark.slow)
    slow = [item for item in items if item.get_closest_marker("slow")]
    cases = Counter(_test(item) for item in slow)
    for item in slow:
        if cases[_test(item)] >= 3 and not _runs_at_every_change(item):
            item.add_marker(pytest.mark.release)


def _test(item: pytest.Item) -> str:
    """Name a test without its case."""
    return item.nodeid.partition("[")[0]


def _runs_at_every_change(item: pytest.Item) -> bool:
    places = item.callspec.indices.values() if isinstance(item, pytest.Function) else ()
    return (sum(places) + crc32(item.path.name.encode())) % 3 == 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Allow rank promotion where the mark says so, for the test's fixtures as well."""
    mode = "allow" if item.get_closest_marker("promotes") else "raise"
    with jax.numpy_rank_promotion(mode):
        return (yield)


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps() -> Iterator[None]:
    """Drop compiled programs between modules before the process runs out of memory maps."""
    yield
    drop_programs()


@pytest.fixture(scope="session")
def gaussian() -> Callable[..., Any]:
    """Return the function that makes exact, or wrong, posteriors of a Gaussian model."""
    # imported here, as the library is type-checked from its first import on
    from tests.gaussian import make_gaussian

    return make_gaussian


@pytest.fixture(scope="session")
def simulator() -> Callable[..., jax.Array]:
    """Return the simulator of the Gaussian model."""
    from tests.gaussian import add_noise

    return add_noise
