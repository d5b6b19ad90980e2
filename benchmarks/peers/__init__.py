"""Comparison with other libraries on the same simulations, one file per library.

Command: `peers`. The folders `speed` and `demonstrations` import the timing of `measure` from here.
"""
