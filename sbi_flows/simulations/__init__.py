"""Simulations: the data set, the simulator on devices, processes and clusters, stores on disk.

Nothing is imported here: a worker process loads `worker` without JAX.
"""
