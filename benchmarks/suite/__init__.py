"""Accuracy and calibration on benchmark tasks: runs, records, scores, references and the report.

Commands: `run`, `report`, `references`. Every folder of the benchmarks may import from here.
"""
