"""Accuracy and calibration on benchmark tasks: runs, their records and scores, and the report."""
