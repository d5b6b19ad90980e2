"""File format of saved posteriors.

This package contains the binary container, a strict JSON parser, and one codec for each part of a
posterior (prior, density, embedding and others).
"""
