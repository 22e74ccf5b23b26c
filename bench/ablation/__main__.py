"""``python -m bench ablation``; see :mod:`bench.ablation.cli`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
