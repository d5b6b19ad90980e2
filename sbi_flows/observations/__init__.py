"""The observations package: batches, standardisation, screening, quantised data, typicality test.

Other packages of the library import from the modules of this package.
"""
