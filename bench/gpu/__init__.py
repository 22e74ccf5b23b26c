"""The run on a machine with a CUDA GPU."""
