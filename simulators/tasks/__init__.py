"""Standard benchmark tasks of simulation-based inference, one file each."""
