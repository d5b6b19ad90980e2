"""Programs on disk, which a second process loads, and programs in memory, which are dropped."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import sbi_flows as sf
from sbi_flows.core import compilation

PROGRAM = """
import sys, jax
import sbi_flows as sf
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
folder = sf.enable_compilation_cache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(float(jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones(300)).round()))
print(hits.count("/jax/compilation_cache/cache_hits"), folder)
"""


def test_a_second_process_compiles_nothing_anew(tmp_path):
    folder, hits = tmp_path / "a" / "programs", []
    for _ in range(2):
        arguments = [sys.executable, "-c", PROGRAM, str(folder)]
        run = subprocess.run(arguments, capture_output=True, text=True, check=True)
        value, found = run.stdout.splitlines()
        assert value == "252.0"
        hits.append(int(found.split()[0]))
        assert found.split()[1] == str(folder)
    assert hits[0] == 0 and hits[1] > 0
    assert list(folder.iterdir())


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"folder: cannot write to .*file/x"):
        sf.enable_compilation_cache(tmp_path / "file" / "x")


@pytest.fixture
def doubled(monkeypatch):
    """A function that is compiled per size, the only registered one."""
    values = {"_COMPILED_PER_SIZE": [], "_FITS": compilation._Fits(), "MAX_SIZES": 3}
    for name, value in values.items():
        monkeypatch.setattr(compilation, name, value)

    @compilation.compiled_per_size
    @jax.jit
    def double(x):
        return 2 * x

    return double


def test_programs_of_a_few_sizes_are_kept_and_dropped_for_one_more(doubled):
    counts = []
    for size in (1, 2, 3, 2, 1, 3, 4, 3, 4, 1, 2):
        compilation.drop_old_programs(size)
        doubled(jnp.zeros(size))
        counts.append(doubled._cache_size())
    assert counts == [1, 2, 3, 3, 3, 3, 1, 2, 2, 3, 1]


def test_all_programs_are_dropped_after_some_drops(doubled, monkeypatch):
    monkeypatch.setattr(compilation, "MAX_DROPS", 2)
    other: Any = jax.jit(lambda x: 3 * x)
    counts = []
    other(jnp.zeros(1))
    for size in range(1, 12):
        compilation.drop_old_programs(size)
        doubled(jnp.zeros(size))
        counts.append(other._cache_size())
    # three sizes are kept, so the fourth and the seventh cause drops
    assert counts == [1] * 6 + [0] * 5


FITS = """
import tests.conftest, sys
import jax, numpy as np, numpyro.distributions as dist
import sbi_flows as sf
from sbi_flows.core import compilation
jax.config.update("jax_numpy_rank_promotion", "allow")
compilation.MAX_SIZES = int(sys.argv[1])
density = sf.MAF(transforms=1, hidden=(8,), context_width=0)
npe = sf.NPE(dist.Normal(0.0, 1.0), density, training=sf.Training(max_epochs=1), members=1)
for i in range(9):
    theta = np.random.default_rng(i).normal(size=(100 + 10 * i, 1))
    npe.fit(jax.random.key(i), sf.Simulations(theta, theta), progress=False, summarise=False)
    with open("/proc/self/maps") as file:
        print(len(file.readlines()))
"""


@pytest.mark.release
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc of Linux")
def test_fits_of_many_sizes_hold_the_memory_maps_of_a_few():
    """A program holds memory maps, of which Linux allows 65,530: each fit took about 700."""
    root, maps = Path(__file__).parents[2], {}
    for most in (3, 100):
        command = [sys.executable, "-c", FITS, str(most)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        maps[most] = [int(line) for line in run.stdout.splitlines()]
    per_fit = (maps[100][-1] - maps[100][2]) / 6
    assert per_fit > 100
    # after the drops at the fourth and the seventh size, there are as many as before
    assert maps[3][5] - maps[3][2] < per_fit
    assert maps[3][8] - maps[3][2] < per_fit
