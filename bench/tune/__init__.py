"""The fastest configurations of the Triton kernels and backends on a GPU."""
