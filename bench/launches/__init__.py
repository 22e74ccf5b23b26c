"""Launches of Triton kernels recorded on a fake GPU, then compiled without one: ``python -m bench launches``."""
