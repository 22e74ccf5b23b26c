"""``python -m bench targets``; see :mod:`bench.targets.run`."""

import sys

from bench.targets.run import main

if __name__ == "__main__":
    sys.exit(main())
