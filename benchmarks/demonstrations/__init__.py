"""Analyses from simulations to diagnostics: real data, truncated rounds, continuous flows.

Commands: `demo`, `uses`, `rounds`, `continuous`.
"""
