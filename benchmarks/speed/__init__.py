"""Times of training, of a calibration check and of a new process, on a CPU or an accelerator.

Commands: `speed`, `batches`, `accelerator`.
"""
