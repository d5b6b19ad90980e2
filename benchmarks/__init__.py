"""Benchmarks and demonstrations of the library; see `python -m benchmarks --help`.

The folders are `suite` (accuracy and calibration on benchmark tasks), `peers` (comparison with
other libraries), `speed`, `demonstrations`, and `results` (the records that the documentation
quotes). A folder may import only from the folders before it in this list.
"""
