"""What makes XLA compile small programs quicker."""

import os
import subprocess
import sys

FLAG = "--xla_cpu_use_fusion_emitters=false"


def quicker_to_compile() -> str:
    """A flag that saves a third of the time; nothing where this XLA does not know it.

    A flag that is not known ends the process, so another process tries it.
    """
    if FLAG in os.environ.get("XLA_FLAGS", ""):
        return ""  # the process that started this one has tried it
    trial = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": FLAG, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        check=False,
    )
    return "" if trial.returncode else FLAG
