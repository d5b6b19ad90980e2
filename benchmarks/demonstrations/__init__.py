"""Analyses from beginning to end: real data, truncated rounds, and the choice of a density."""
