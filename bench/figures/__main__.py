"""``python -m bench.figures``; see :mod:`bench.figures_run`."""

import sys

from bench.figures_run import main

if __name__ == "__main__":
    sys.exit(main())
