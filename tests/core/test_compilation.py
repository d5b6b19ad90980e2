"""Compilation cache: a second process loads programs that the first one compiled."""

import subprocess
import sys

import pytest

import sbi_flows as sf

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
