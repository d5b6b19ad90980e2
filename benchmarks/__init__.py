"""Benchmarks of the library and its demonstration on real data: `python -m benchmarks --help`."""
