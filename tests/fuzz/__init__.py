"""Random calls of every op by every backend, compared with the reference: ``make fuzz``."""
