"""``python -m bench estimate``: what each workload should take of a GPU, from its shapes and its compiled kernels."""
