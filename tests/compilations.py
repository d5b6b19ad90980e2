"""Count the programs that JAX compiles."""

import contextlib
import logging
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def count_compilations() -> Iterator[list[str]]:
    """Collect the message of each compilation within the context, in a list."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message.startswith("Finished XLA compilation"):
                messages.append(message)

    logger, handler = logging.getLogger("jax._src.dispatch"), Collect()
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield messages
    finally:
        logger.removeHandler(handler)
