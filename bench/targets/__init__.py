"""The targets this project is held to, measured and judged."""
