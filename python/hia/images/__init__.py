"""Radiographs: loading, windows, and the processor that turns them into a model's inputs."""
