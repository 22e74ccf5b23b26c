"""A process that runs jobs, one line of JSON each: ``python -m tests.fuzz.worker FILE``.

FILE holds the case that runs: if the process dies, that one has killed it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

import torch

from tests.fuzz.jobs import Job, run
from tests.fuzz.strategies import CALLS


def main() -> None:
    """Say which calls can run here, then answer jobs until there are no more."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr  # what a library prints is no answer
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # of NumPy, which computes with NaN in the interpreter
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process ends it
    latest = Path(sys.argv[1])
    print(json.dumps(CALLS), file=answers)
    for line in sys.stdin:
        outcome = run(
            Job(**json.loads(line)), lambda case: latest.write_text(case.program(), encoding="utf-8") and None
        )
        print(json.dumps(outcome.asdict()), file=answers)


if __name__ == "__main__":
    main()
