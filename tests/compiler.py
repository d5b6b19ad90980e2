"""What makes XLA compile small programs quicker."""

import importlib.util
import mmap
from pathlib import Path

FLAG = b"xla_cpu_use_fusion_emitters"


def quicker_to_compile() -> str:
    """A flag that saves a third of the time; nothing where this XLA does not know it.

    A flag that is not known ends the process.
    """
    spec = importlib.util.find_spec("jaxlib")
    assert spec is not None and spec.origin is not None
    for library in Path(spec.origin).parent.glob("*.so*"):
        with library.open("rb") as file:
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if text.find(FLAG) >= 0:
                return f"--{FLAG.decode()}=false"
    return ""
