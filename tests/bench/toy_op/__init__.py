"""An op that nobody needs, complete: what a new one brings, and no more. See ``tests/bench/test_toy_op.py``."""
