"""A stand-in for the capture of CUDA graphs, on any device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor


class Recorder:
    """Captures by remembering the function; a replay computes it again, into the same memory."""

    def __init__(self, fails: Callable[[Sequence[Tensor]], bool] = lambda inputs: False):
        self.nbytes = 100
        self.fails = fails
        self.captured, self.replays, self.running = [], 0, 0

    def __call__(self, function, inputs):
        if self.fails(inputs):
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captured.append(tuple(inputs[0].shape))
        out = function(*inputs)

        def replay():
            assert self.running == 0, "replays share memory"
            self.running += 1
            time.sleep(0.001)
            self.replays += 1
            out.copy_(function(*inputs))
            self.running -= 1
            return out

        return replay

    def release(self):
        self.nbytes = 0
