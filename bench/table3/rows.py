"""The product of a run of Table 3: the protocol it states, its rows, and the claims it checks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..measure.footprint import Footprint
from . import formulas, paper
from .hosts import LLAVA_13B, HostSpec

# the stricter reading of the paper's GB, and of a 32 GB card: what fits under it fits under GiB too
BYTES_PER_GB = 10**9

HIA_FLOPS_GROWTH = 0.03
BASELINE_FLOPS_GROWTH = 4.0
FORMULA_TOLERANCE = 0.02
TRACKER_TOLERANCE = 0.05
LAYER_METHODS = ("hia", "released")


@dataclass(frozen=True)
class Protocol:
    """The protocol, stated in every output.

    Attributes:
        images_per_sample: images in the one sample of the batch.
        text_tokens: tokens beside the images'.
        unit: "flops" (2 a multiply-add) or "macs", for display; rows hold both.
        dtype: of weights and activations: bf16, fp16 or fp32.
        attention: implementations whose memory is shown.
        card_gb: what ``fits`` is judged by, in GB of 1e9 bytes.
        host: the MLLM.
    """

    images_per_sample: int = 2
    text_tokens: int = 60
    unit: str = "flops"
    dtype: str = "bf16"
    attention: tuple[str, ...] = ("eager", "sdpa")
    card_gb: float = 32.0
    host: HostSpec = field(default=LLAVA_13B)

    @property
    def card_bytes(self) -> int:
        """Return the card's memory."""
        return round(self.card_gb * BYTES_PER_GB)

    def flops_unit(self) -> tuple[str, int]:
        """Name the FLOPs columns' unit, and give how many FLOPs it is."""
        return ("TMACs", 2 * 10**12) if self.unit == "macs" else ("TFLOPs", 10**12)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **asdict(self),
            "attention": list(self.attention),
            "phase": "prefill of one sample with KV cache, logits of the last token",
            "flops_counted": "matrix products and convolutions, attention in full",
            "bytes_per_gb": BYTES_PER_GB,
        }


@dataclass(frozen=True)
class Row:
    """One method at one resolution with one attention.

    Attributes:
        resolution: side of the square images, pixels.
        method: baseline, anyres, released or hia.
        attention: eager or sdpa.
        flops: counted under fake tensors, 2 a multiply-add.
        macs: half of it.
        memory_bytes: peak; None if it ran out of memory.
        memory_kind: "predicted", or how it was measured.
        fits: ``memory_bytes`` is at most the card's.
        prefill_ms: median; None where nothing was run.
        paper_flops_t: the paper's FLOPs (T), None where it has none.
        paper_memory_gb: the paper's memory (GB), None where it has none or prints x.
        paper_out_of_memory: the paper prints x.
        tokens: length of the LLM's sequence.
        formula_flops: the cross-check's FLOPs.
        weight_bytes: parameters and buffers.
        predicted_bytes: the prediction beside a measured row.
        host: the model's name.
    """

    resolution: int
    method: str
    attention: str
    flops: int | None
    macs: int | None
    memory_bytes: int | None
    memory_kind: str
    fits: bool | None
    prefill_ms: float | None
    paper_flops_t: float | None
    paper_memory_gb: float | None
    paper_out_of_memory: bool
    tokens: int
    formula_flops: int | None
    weight_bytes: int | None
    predicted_bytes: int | None
    host: str

    @property
    def formula_deviation(self) -> float | None:
        """Return formula over count, minus 1."""
        if self.flops is None or self.formula_flops is None:
            return None
        return self.formula_flops / self.flops - 1

    @property
    def prediction_deviation(self) -> float | None:
        """Return prediction over measurement, minus 1; for measured rows."""
        if self.predicted_bytes is None or self.memory_bytes is None:
            return None
        return self.predicted_bytes / self.memory_bytes - 1

    @property
    def key(self) -> tuple[int, str, str]:
        """Return (resolution, method, attention)."""
        return self.resolution, self.method, self.attention


def predicted_row(
    case: tuple[int, str, str], footprint: Footprint, flops: int, formula: int, tokens: int, protocol: Protocol
) -> Row:
    """Make a row of the predicted table; ``flops`` is counted once for all attentions."""
    resolution, method, attention = case
    figure = paper.figure(method, resolution)
    return Row(
        resolution,
        method,
        attention,
        flops,
        flops // 2,
        footprint.peak_bytes,
        "predicted",
        footprint.peak_bytes <= protocol.card_bytes,
        None,
        figure.flops_t if figure else None,
        figure.memory_gb if figure else None,
        bool(figure and figure.out_of_memory),
        tokens,
        formula,
        footprint.weight_bytes,
        None,
        protocol.host.name,
    )


@dataclass(frozen=True)
class Layers:
    """FLOPs of the HiA layers without the encoder: what was counted, less host and encoder by formula.

    Attributes:
        resolution: side of the square images, pixels.
        hia: ours, with folded weights.
        released: the released maths'.
    """

    resolution: int
    hia: int
    released: int

    @property
    def ratio(self) -> float:
        """Return ours over theirs."""
        return self.hia / self.released


def _layer_flops(row: Row | None, protocol: Protocol) -> int | None:
    if row is None or row.flops is None:
        return None
    counts = (protocol.images_per_sample, protocol.text_tokens)
    return row.flops - formulas.outside_flops(row.method, protocol.host, row.resolution, *counts)


@dataclass
class Report:
    """Everything a run found; incomplete after Ctrl-C.

    Attributes:
        protocol: stated with every number.
        rows: the 13B host, predicted.
        measured: rows really run (the 13B host on CUDA, the small host on the CPU).
        measured_host: what was run, in words; None if nothing was.
        skipped: measurements not made, and why.
        notes: what a reader must know.
        environment: of :func:`bench.records.environment.describe`.
        images: where the measured runs' images and text came from.
        interrupted: Ctrl-C.
        failed: a method's runs ended with an error, which ``skipped`` has.
        wall_s: of the run.
    """

    protocol: Protocol
    rows: list[Row] = field(default_factory=list)
    measured: list[Row] = field(default_factory=list)
    measured_host: str | None = None
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False
    failed: bool = False
    wall_s: float = 0.0

    def find(self, resolution: int, method: str, attention: str) -> Row | None:
        """Find a predicted row."""
        return next((row for row in self.rows if row.key == (resolution, method, attention)), None)

    def claims(self) -> list[Claim]:
        """Make all checks on what is there."""
        attention = self.protocol.attention
        return [
            growth_claim(self.rows, "hia", attention[0]),
            growth_claim(self.rows, "baseline", attention[0]),
            *(memory_claim(self.rows, name) for name in attention),
            formula_claim(self.rows),
            tracker_claim(self.measured),
        ]

    def layers(self) -> list[Layers]:
        """List our layers' FLOPs beside the released maths', at every resolution that has both."""
        found, attention = [], self.protocol.attention[0]
        for resolution in sorted({row.resolution for row in self.rows}):
            counts = [_layer_flops(self.find(resolution, name, attention), self.protocol) for name in LAYER_METHODS]
            if None not in counts:
                found.append(Layers(resolution, *counts))
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "protocol": self.protocol.to_dict(),
            "environment": self.environment,
            "images": self.images,
            "rows": [asdict(row) for row in self.rows],
            "layers": [{**asdict(entry), "ratio": entry.ratio} for entry in self.layers()],
            "measured_host": self.measured_host,
            "measured": [asdict(row) for row in self.measured],
            "skipped": self.skipped,
            "claims": [asdict(claim) for claim in self.claims()],
            "notes": self.notes,
            "paper": paper.SOURCE,
            "interrupted": self.interrupted,
            "wall_s": round(self.wall_s, 1),
        }


@dataclass(frozen=True)
class Claim:
    """Something the table must show.

    Attributes:
        text: the claim.
        passed: None if the run lacks the rows to tell.
        detail: the numbers.
    """

    text: str
    passed: bool | None
    detail: str


def growth_claim(rows: Sequence[Row], method: str, attention: str) -> Claim:
    """Check FLOPs from 448 to 896 pixels: HiA's hardly grow, the baseline's more than fourfold."""
    if method == "hia":
        text = f"HiA's FLOPs grow by less than {HIA_FLOPS_GROWTH:.0%} from 448 to 896 (paper: 6.3 %)"
    else:
        text = f"the baseline's FLOPs grow more than {BASELINE_FLOPS_GROWTH:.0f}-fold from 448 to 896 (paper: 4.4)"
    flops = {row.resolution: row.flops for row in rows if row.method == method and row.attention == attention}
    if not flops.get(448) or not flops.get(896):
        return Claim(text, None, f"needs {method} at 448 and 896")
    factor = flops[896] / flops[448]
    if method == "hia":
        return Claim(text, factor - 1 < HIA_FLOPS_GROWTH, f"{factor - 1:.2%}")
    return Claim(text, factor > BASELINE_FLOPS_GROWTH, f"{factor:.2f}-fold")


def memory_claim(rows: Sequence[Row], attention: str) -> Claim:
    """Check HiA's predicted memory at 896 against the paper's."""
    text = f"HiA's predicted memory at 896, {attention}, is below the paper's {paper.MEMORY_BOUND_GB} GB"
    row = next((row for row in rows if row.key == (896, "hia", attention)), None)
    if row is None or row.memory_bytes is None:
        return Claim(text, None, "needs hia at 896")
    gb = row.memory_bytes / BYTES_PER_GB
    return Claim(text, gb < paper.MEMORY_BOUND_GB, f"{gb:.2f} GB")


def formula_claim(rows: Sequence[Row]) -> Claim:
    """Check that formula and counter agree."""
    text = f"counted FLOPs and the formula agree within {FORMULA_TOLERANCE:.0%} in every row"
    worst = _worst((row.formula_deviation, row) for row in rows)
    if worst is None:
        return Claim(text, None, "needs a counted row")
    deviation = abs(worst[0])
    return Claim(text, deviation <= FORMULA_TOLERANCE, f"largest deviation {deviation:.1e} ({_where(worst[1])})")


def tracker_claim(measured: Sequence[Row]) -> Claim:
    """Check that predicted and measured peaks agree; where ours works in place and in strips it may need less."""
    text = (
        f"predicted and measured peaks agree within {TRACKER_TOLERANCE:.0%} in every measured row; hia's on a CPU, "
        "in place and in strips, may be lower"
    )
    known = [(row.prediction_deviation, row) for row in measured if row.prediction_deviation is not None]
    spared = [(deviation, row) for deviation, row in known if deviation > 0 and _needs_less(row)]
    worst = _worst(pair for pair in known if pair not in spared)
    if worst is None and not spared:
        return Claim(text, None, "no peak was measured")
    details = [f"largest deviation {worst[0]:+.1%} ({_where(worst[1])})"] if worst else []
    most = _worst(spared)
    details += [f"lower by up to {most[0]:.1%} of the measured ({_where(most[1])})"] if most else []
    return Claim(text, worst is None or abs(worst[0]) <= TRACKER_TOLERANCE, ", ".join(details))


def _needs_less(row: Row) -> bool:
    """Tell whether what runs needs less than the plain implementation, which is what a prediction follows."""
    return row.method == "hia" and "cuda" not in row.memory_kind


def _worst(deviations: Iterable[tuple[float | None, Row]]) -> tuple[float, Row] | None:
    known = [(deviation, row) for deviation, row in deviations if deviation is not None]
    return max(known, key=lambda pair: abs(pair[0]), default=None)


def _where(row: Row) -> str:
    return f"{row.method} {row.resolution} {row.attention}"
