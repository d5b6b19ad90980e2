"""Observations: shapes, batches, standardisation, and which are typical of the simulations."""
