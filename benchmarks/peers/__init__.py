"""Comparison with other libraries on the same simulations, one file per library.

Command: `peers`. The folders `speed` and `demonstrations` import timing functions from `measure`.
"""
