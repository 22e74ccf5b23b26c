"""One question as a user asks it: time to first token, second question, decode, training step."""
