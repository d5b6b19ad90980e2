"""The observations package: batches, standardisation, screening, quantised data, typicality test.

Code outside this folder imports from the folder's files directly.
"""
