"""Per op: its Triton kernels and the configurations to compile."""
