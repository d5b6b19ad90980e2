"""Standard benchmark tasks of simulation-based inference, one file per task.

Import the functions that make them, such as `two_moons`, from the package `simulators`.
"""
