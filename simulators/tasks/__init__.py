"""Standard benchmark tasks of simulation-based inference, one file each.

Import their constructors, such as `two_moons`, from the package `simulators`.
"""
