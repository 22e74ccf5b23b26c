"""The time of one call, op by op."""
