"""Observations: batches, standardisation, screening, quantised data, and typicality with its test.

Files outside this room import from its files.
"""
