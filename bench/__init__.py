"""Benchmarks: one file a question. ``python -m bench table3`` answers the paper's Table 3."""
