"""Benchmarks and demonstrations of the library; see `python -m benchmarks --help`.

The folders are `suite` (accuracy and calibration on benchmark tasks), `peers` (comparison with
other libraries), `speed`, `demonstrations`, and `results` (the records that the pages quote). A
folder may import from those before it in this list.
"""
