"""The adapter on a host: hooks, training, checkpoints, and what can be read from a run."""
