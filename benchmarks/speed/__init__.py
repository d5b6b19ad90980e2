"""Times of training, of a calibration check and of a cold process, on a CPU or an accelerator.

Commands: `speed`, `batches`, `accelerator`.
"""
