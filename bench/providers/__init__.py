"""Providers: our functions, every peer, and the port of the released maths."""
