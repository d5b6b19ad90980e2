"""Run simulators on devices, processes and clusters, and keep the simulations in memory or on disk.

This file imports no module, so that a worker process can import `worker` without JAX.
"""
