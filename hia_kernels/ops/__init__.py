"""One folder an op; read functional.py, then reference.py, then library.py."""
