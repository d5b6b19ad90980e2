"""The task class, the registry, adapters for programs and numpyro models, and samplers.

Import `Task`, `ReferenceFailed`, `external_simulator`, `executable`, `from_numpyro`, `get`, `list`
and `names` from the package `simulators`.
"""
