"""The ablation's protocol, settled before it is run: phantoms, sizes, steps, rates, rows, seeds, metrics.

A change after a result was seen goes into a commit of its own that says why; :meth:`Protocol.fingerprint` names the
protocol in every record, and records of different ones don't share a table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from bench.cli import did_you_mean
from hia.phantom import TASKS
from hia.phantom.host import TinyHostRecipe, inputs_fingerprint

CHANCE = {"description": 1 / 20, "disease": 1 / 2, "location": 1 / 4, "comparative": 1 / 5}


@dataclass(frozen=True)
class Row:
    """One line of a table: what differs from the full model.

    Attributes:
        name: on the command line.
        title: in the tables.
        table: which one it is in: "2", "4a" (M), "4b" (layers) of the paper, "ours", "start".
        changes: fields of :class:`hia.HiAConfig`, and choices of a run, as :func:`hia.get_hia_model` takes them.
        parts: of the start that are changed from PyTorch's: "linears", "queries", "condition"; None takes the config's.
        low_resolution: the adapter's images are the host's size, and so were those its encoder was pre-trained on.
    """

    name: str
    title: str
    table: str
    changes: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] | None = None
    low_resolution: bool = False


FULL = Row("full", "full", "2")
ROWS = (
    FULL,
    Row("no-instruction", "without instruction awareness", "2", {"instruction_aware": False}),
    Row("no-high-resolution", "without high resolution", "2", {"high_resolution": False}, low_resolution=True),
    Row("m4", "M = 4", "4a", {"num_queries": 4}),
    Row("m128", "M = 128", "4a", {"num_queries": 128}),
    Row("half", "{L/2}", "4b", {"layers": "half"}),
    Row("quarters", "{L/4, 2L/4, 3L/4}", "4b", {"layers": "quarters"}),
    Row("early", "{0, 1}: where the host reads", "4b", {"layers": (0, 1)}),
    Row("paper-form", "without the queries' residual (the paper's form)", "ours", {"query_residual": False}),
    Row("no-position", "without position", "ours", {"position": "none"}),
    Row("pytorch-start", "PyTorch's start (as first shipped)", "ours", {"init": "pytorch", "query_std": 0.02}),
    Row("live-norm", "live batch-norm", "ours", {"batch_norm": "batch"}),
)
# The start is taken apart in the paper's form: with the residual M tokens differ from the first step on.
_PAPER = {"query_residual": False}
START_ROWS = (
    Row("start-none", "PyTorch's start", "start", _PAPER, ()),
    Row("start-linears", "unit-variance linears", "start", _PAPER, ("linears",)),
    Row("start-queries-condition", "queries, condition", "start", _PAPER, ("queries", "condition")),
    Row("start-linears-queries", "linears, queries", "start", _PAPER, ("linears", "queries")),
    Row("start-linears-condition", "linears, condition", "start", _PAPER, ("linears", "condition")),
    Row("start-all", "all three (as shipped)", "start", _PAPER, ("linears", "queries", "condition")),
)


@dataclass(frozen=True)
class Protocol:
    """Everything that all rows share.

    Attributes:
        size: side of the phantoms, pixels.
        radius: of their lesions, in 192nds of the side: small ones, which the host's view loses.
        tasks: that are asked, in turn.
        train_samples: questions the adapter is trained on.
        test_samples: held-out questions of each task.
        steps: of training, the same for every row.
        batch_size: questions a step.
        lr: highest; warm-up over ``warm_up`` steps, then a cosine to 0.
        warm_up: steps.
        encoder_lr_scale: the encoder's rate over the adapter's.
        weight_decay: AdamW's.
        clip: gradients' norm.
        config: fields of :class:`hia.HiAConfig` of the full model: the paper's, and the queries' residual.
        encoder_steps: of the encoder's pre-training on the phantoms' lesion masks, without any answer.
        encoder_batch: images a step there.
        encoder_lr: highest there.
        host: how the frozen host is made.
        seeds: of adapter, order and phantoms; host and pre-trained encoder are shared.
        evaluate_every: steps between scores of the learning curve, on ``curve_samples`` a task.
        curve_samples: held-out questions of each task for the curve.
    """

    size: int = 192
    radius: tuple[float, float] = (1.5, 3.25)
    tasks: tuple[str, ...] = TASKS
    train_samples: int = 3000
    test_samples: int = 240
    steps: int = 600
    batch_size: int = 16
    lr: float = 2e-3
    warm_up: int = 20
    encoder_lr_scale: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    config: dict[str, Any] = field(
        default_factory=lambda: {
            "dim": 64,
            "num_heads": 4,
            "num_queries": 32,
            "encoder": "strided",
            "encoder_stride": 16,
            "encoder_width": 8,
            "query_residual": True,
        }
    )
    encoder_steps: int = 1500
    encoder_batch: int = 32
    encoder_lr: float = 2e-3
    host: TinyHostRecipe = field(default_factory=TinyHostRecipe)
    seeds: tuple[int, ...] = (1, 2, 3)
    evaluate_every: int = 100
    curve_samples: int = 60

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def fingerprint(self, *names: str, row: Row | None = None) -> str:
        """Name what a result depends on: the given fields, or all but the seeds; and the row, if one is given."""
        chosen = {
            name: value for name, value in self.to_dict().items() if (name in names if names else name != "seeds")
        }
        chosen |= {"inputs": inputs_fingerprint(), "row": None if row is None else dataclasses.asdict(row)}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]


# For CI, nothing cached: a smaller host, fewer phantoms, shorter training of the encoder. It shows presence, not the
# tables. 320 steps end where presence begins to be learnt, before or behind it by a processor's order of sums; at 800
# seeds 1 to 3 were at .95 or more with AVX-512 (AMX), seed 1 with AVX2.
QUICK_PROTOCOL = Protocol(
    train_samples=1600,
    test_samples=120,
    steps=800,
    encoder_steps=700,
    seeds=(1,),
    evaluate_every=80,
    curve_samples=40,
    host=TinyHostRecipe(layers=6, samples=4000, tower_steps=400, steps=500),
)


def row_named(name: str) -> Row:
    """Find a row.

    Raises:
        ValueError: no such row.
    """
    found = {row.name: row for row in (*ROWS, *START_ROWS)}
    if name not in found:
        raise ValueError(f"--rows: must be among {', '.join(found)}, got {name!r}{did_you_mean(name, found)}")
    return found[name]
