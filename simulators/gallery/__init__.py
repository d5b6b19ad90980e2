"""Models with real observations: lynx and hare, influenza in a school, eight schools.

Import their constructors, such as `lynx_hare`, from the package `simulators`.
"""
