"""Accuracy and calibration on benchmark tasks: runs, records, scores, references and the report.

Commands: `run`, `report`, `references`. All other folders of the benchmarks may import this one.
"""
