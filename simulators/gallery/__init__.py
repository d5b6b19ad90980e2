"""Models with real observations: lynx and hare, influenza in a school, eight schools.

Import the functions that make them, such as `lynx_hare`, from the package `simulators`.
"""
