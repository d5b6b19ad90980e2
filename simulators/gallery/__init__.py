"""Models with real observations: lynx and hare, influenza in a school, eight schools."""
