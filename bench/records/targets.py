"""The ratios the project is held to, in one place, and what records say of them: ``python -m bench targets``.

Each is the ratio of two measurements of one workload, taken in turns in one run; in fp32 on the CPU, in bf16 on CUDA.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..workloads import CASES, LayerCase, Workload
from .record import Measurement

OURS = "hia"
# kind of target -> what its ratio is, and whether it must be at least or at most the number
KINDS = {
    "speedup": ("their time / ours", ">="),
    "overhead": ("our time / theirs", "<="),
    "peak": ("our peak memory / theirs", "<="),
    "activations": ("our activation memory / theirs", "<="),
    "roofline": ("roofline / our time", ">="),
    "flops": ("our FLOPs / theirs", "<="),
}
ATTENTIONS = (
    "sdpa_math",
    "sdpa_efficient",
    "sdpa_flash",
    "sdpa_cudnn",
    "flash_attn_2",
    "flash_attn_3",
    "flash_attn_4",
    "xformers",
    "ffpa",
    "ffpa_cutedsl",
)
# of wide heads, those that keep no scores; math does, and its backward has one product in five less to do
WIDE = ("sdpa_efficient", "sdpa_flash", "sdpa_cudnn", "xformers", "ffpa", "ffpa_cutedsl")
FOLDED = ("channels_last_compile",)  # the compiler's best: channels last, batch-norm folded
# queries read 784, 3136, 12544 and 16384 features
SIDES = (896, 1792, 3584, 4096)


@dataclass(frozen=True)
class Target:
    """A ratio and what it must be.

    Attributes:
        name: what ``--only`` takes.
        kind: a key of :data:`KINDS`.
        op: of the workload.
        case: of the workload, with ":role" where the op has several; for "flops" the images' side in pixels.
        mode: in which it is measured; "" where nothing is.
        against: providers; the best of them counts.
        cpu: what it must be on the CPU; None where nothing is asked.
        cuda: likewise on CUDA.
    """

    name: str
    kind: str
    op: str
    case: str
    mode: str
    against: tuple[str, ...]
    cpu: float | None = None
    cuda: float | None = None

    @property
    def workload(self) -> Workload:
        """Return what is measured."""
        case, _, role = self.case.partition(":")
        return Workload(self.op, CASES[case], role)

    def wanted(self, device: str) -> float | None:
        """Return what the ratio must be on "cpu" or "cuda"."""
        return self.cpu if device == "cpu" else self.cuda


def _layer_targets() -> list[Target]:
    two, large, one = "13b-released-896-2img", "13b-released-1792-2img", "13b-released-4096"
    step = ("adapter_train_step", two, "both")
    return [
        Target("layer-896", "speedup", "adapter_layer", two, "forward", ("released",), 1.5, 2.0),
        Target("layer-896-compile", "speedup", "adapter_layer", two, "forward", ("released_compile",), 1.3, 1.5),
        Target("layer-896-textbook", "speedup", "adapter_layer", two, "forward", ("textbook",)),
        Target("layer-896-gemms", "overhead", "adapter_layer", two, "forward", ("gemms",), 1.2, 1.25),
        Target("layer-1792", "speedup", "adapter_layer", large, "forward", ("released",), 2.0, 2.0),
        Target("layer-4096", "speedup", "adapter_layer", one, "forward", ("released",), 2.2, 3.0),
        Target("second-question-896", "speedup", "second_question", two, "forward", ("released",), 2.0, 2.5),
        Target("train-step-896", "speedup", *step, ("released_compile",), 1.3, 1.5),
        Target("train-step-896-activations", "activations", *step, ("released_compile",), 0.6, 0.5),
        Target("train-step-896-released", "speedup", *step, ("released",)),
    ]


def _attention_targets() -> list[Target]:
    found = []
    for side in SIDES:
        for mode in ("forward", "backward"):
            where = ("speedup", "cross_attention")
            narrow, name = f"13b-{side}:extract", f"{side // 32 * (side // 32)}-{mode}"
            found.append(Target(f"attention-128-{name}", *where, narrow, mode, ATTENTIONS, None, 1.0))
            for host, width in (("7b", 512), ("13b", 640)):
                case = f"{host}-released-{side}:extract"
                found.append(Target(f"attention-{width}-{name}", *where, case, mode, WIDE, 1.0, 2.0))
                found.append(Target(f"attention-{width}-{name}-math", *where, case, mode, ("sdpa_math",)))
    return found


def _encoder_targets() -> list[Target]:
    step = ("encode_train_step", "px896", "both")
    found = [
        Target("encode-896", "speedup", "encode", "px896", "forward", ("eager",), 2.5, 4.0),
        Target("encode-896-compile", "speedup", "encode", "px896", "forward", FOLDED, 1.0, 1.3),
        Target("encode-896-roofline", "roofline", "encode", "px896", "forward", (), 0.85, 0.6),
    ]
    for side in (2048, 4096):
        where = ("encode", f"px{side}", "forward", FOLDED)
        found.append(Target(f"encode-{side}-compile", "speedup", *where, 1.0, 1.3))
        found.append(Target(f"encode-{side}-memory", "peak", *where, 0.7, None))
    stem = ("stem", "px2048-16bit", "forward", ("eager_rgb",))
    return [
        *found,
        Target("stem-16bit", "speedup", *stem, 3.0, 5.0),
        Target("stem-16bit-memory", "peak", *stem, 0.25, None),
        Target("encode-step-896", "speedup", *step, ("compile",), 1.0, 1.1),
        Target("encode-step-896-activations", "activations", *step, ("eager",), 0.45, 0.45),
    ]


TARGETS: tuple[Target, ...] = (
    *_layer_targets(),
    *_attention_targets(),
    *_encoder_targets(),
    Target("table3-flops-896", "flops", "layers", "896", "", ("released",), 0.7, 0.7),
    Target("table3-flops-4096", "flops", "layers", "4096", "", ("released",), 0.45, 0.45),
)


# should the time be over early: what is asked of 896 pixels comes first, by op, then larger images
OPS_FIRST = ("encode", "cross_attention", "adapter_layer", "second_question", "stem")
SIDES_FIRST = (896, 1792, 2048, 4096)
SIDE = re.compile(r"(?:px|-)(\d{3,4})(?=[-:]|$)")


def importance(workload: Workload) -> tuple[int, int, int]:
    """Return what sorts workloads: the most important first. The stem has one size, so its own doesn't count."""
    found = SIDE.search(workload.case.name)
    side = 896 if found is None or workload.op == "stem" else int(found.group(1))
    size = SIDES_FIRST.index(side) if side in SIDES_FIRST else len(SIDES_FIRST)
    place = OPS_FIRST.index(workload.op) if workload.op in OPS_FIRST else len(OPS_FIRST)
    width = workload.case.config.head_dim if isinstance(workload.case, LayerCase) else 0
    return size, place, -width


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured of it.

    Attributes:
        name: of the target.
        kind: of the target.
        where: op, case and mode.
        target: what the ratio must be; None where nothing is asked on the device.
        ratio: None where it wasn't measured.
        verdict: "met", "MISSED", "no target" or "not measured".
        note: whom ours was compared with and both numbers, or why it wasn't.
    """

    name: str
    kind: str
    where: str
    target: float | None
    ratio: float | None
    verdict: str
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return asdict(self)


def judge(target: Target, records: Iterable[Measurement], device: str) -> Verdict:
    """Judge a target by the records of its workload; what is counted and not measured is left open."""
    rows = {
        record.provider: record
        for record in records
        if (record.op, record.case, record.mode, record.device) == (target.op, target.case, target.mode, device)
    }
    problem = _missing(OURS, rows) if OURS not in rows or rows[OURS].status != "ok" else None
    if problem is not None:
        return verdict(target, device, None, problem)
    ours = rows[OURS]
    if target.kind == "roofline":
        return verdict(target, device, (ours.percent_of_roofline or 0.0) / 100, _milliseconds(ours))
    others = [rows[name] for name in target.against if name in rows and rows[name].status == "ok"]
    values = {record.provider: _value(target.kind, record) for record in others}
    known = {name: value for name, value in values.items() if value}
    own = _value(target.kind, ours)
    if not known or not own:
        reasons = dict.fromkeys(_missing(name, rows) for name in target.against if name not in known)
        return verdict(target, device, None, "; ".join(reasons))
    best = min(known, key=lambda name: known[name])
    ratio = known[best] / own if target.kind == "speedup" else own / known[best]
    return verdict(target, device, ratio, _compared(target.kind, ours, rows[best]) + _apart(ours, rows[best]))


def _value(kind: str, record: Measurement) -> float | None:
    if kind == "peak":
        return record.peak_bytes
    return record.extra.get("activation_bytes") if kind == "activations" else record.p50_ms


def _missing(name: str, rows: dict[str, Measurement]) -> str:
    return f"{name}: {rows[name].reason or 'nothing of that kind was measured' if name in rows else 'not run'}"


def _milliseconds(record: Measurement) -> str:
    return f"{record.provider} {record.p50_ms:,.4g} ms" + (" (noisy)" if record.noisy else "")


def _compared(kind: str, ours: Measurement, other: Measurement) -> str:
    if kind in ("speedup", "overhead"):
        return f"{_milliseconds(ours)}, {_milliseconds(other)}"
    sizes = (f"{one.provider} {(_value(kind, one) or 0) / 1e6:,.4g} MB" for one in (ours, other))
    return ", ".join(sizes)


def _apart(ours: Measurement, other: Measurement) -> str:
    """Say that the two were not measured in turns, but in runs of their own."""
    dates = [str(one.environment.get("date", "")) for one in (ours, other)]
    return "" if dates[0] == dates[1] else f"; in two runs: {OURS} {dates[0]}, {other.provider} {dates[1]}"


def verdict(target: Target, device: str, ratio: float | None, note: str) -> Verdict:
    """Return the verdict on a ratio; None where it wasn't measured."""
    wanted, (_, sense) = target.wanted(device), KINDS[target.kind]
    if ratio is None:
        word = "not measured"
    elif wanted is None:
        word = "no target"
    else:
        word = "met" if (ratio >= wanted if sense == ">=" else ratio <= wanted) else "MISSED"
    where = " ".join(filter(None, (target.op, target.case, target.mode)))
    return Verdict(target.name, target.kind, where, wanted, ratio, word, note)


def cells(verdicts: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table, from :meth:`Verdict.to_dict`."""
    header = ["target", "workload", "ratio of", "must be", "measured", "verdict", "note"]
    rows = []
    for one in verdicts:
        what, sense = KINDS[one["kind"]]
        target = "-" if one["target"] is None else f"{sense} {one['target']:g}"
        ratio = "-" if one["ratio"] is None else f"{one['ratio']:.2f}"
        rows.append([one["name"], one["where"], what, target, ratio, one["verdict"], one["note"]])
    return header, rows
