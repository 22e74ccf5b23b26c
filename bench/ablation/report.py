"""Tables and plot of the ablation's runs: mean and spread over seeds, the paper's figures beside them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..plotting import COLOURS, INK, finish, new_figure, unavailable, write_png
from ..records.files import replacing, write_json, write_text
from ..records.markdown import table
from .protocol import CHANCE, FULL, ROWS, START_ROWS, Row

OURS, LIMIT, OTHERS = COLOURS[0], COLOURS[1], "#9fc9c7"
SHORT = {"description": "Des", "disease": "Dis", "location": "Loc", "comparative": "Com"}
# HiA, Tables 2 and 4, BLEU-4 of description, disease, location, comparative; M there is 128, 256, 512
PAPER = {
    "full": (54.8, 49.5, 43.9, 42.5),
    "no-instruction": (53.1, 45.6, 38.9, 38.8),
    "no-high-resolution": (51.6, 44.8, 42.3, 41.6),
    "half": (52.1, 45.8, 41.2, 39.9),
    "quarters": (54.2, 49.0, 43.4, 41.8),
}
TABLES = {
    "2": "Table 2: what the parts are worth",
    "4a": "Table 4: learnable queries",
    "4b": "Table 4: layers",
    "ours": "Rows of ours",
    "start": "The start, part by part",
}
HEALTH = {  # of adapter_health, by layer; what the diagnosis of a dead start was made with
    "extraction_entropy": "extraction entropy",
    "query_cosine": "cosine of Z̄",
    "effective_rank": "rank of Z̄",
    "update_ratio": "update / V",
    "update_cosine": "cosine of updates",
}


def scores_of(runs: Iterable[dict[str, Any]], row: str, task: str) -> list[float]:
    """List a row's scores of one task, a seed each."""
    return [run["scores"][task] for run in runs if run["row"] == row]


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = statistics.mean(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ({min(values):.2f}-{max(values):.2f})"


def _table(runs: list[dict[str, Any]], rows: Sequence[Row], tasks: Sequence[str]) -> list[str]:
    lines = []
    for row in rows:
        seeds = sum(run["row"] == row.name for run in runs)
        if not seeds:
            continue
        columns = [scores_of(runs, row.name, task) for task in tasks]
        means = [statistics.mean(values) for values in zip(*columns, strict=True)]
        paper = " / ".join(map(str, PAPER.get(row.name, ())))
        lines.append([row.title, seeds, *map(_cell, columns), _cell(means), paper])
    chance = [CHANCE[task] for task in tasks]
    lines.append(["*chance*", "", *(f"{share:.2f}" for share in chance), f"{statistics.mean(chance):.2f}", ""])
    return table(["row", "seeds", *(SHORT[task] for task in tasks), "mean", "paper, B4"], lines)


def _health(runs: list[dict[str, Any]], rows: Sequence[Row]) -> list[str]:
    names = [name for name in HEALTH if any(name in key for run in runs for key in run["health"]["after"])]
    lines = []
    for row in rows:
        own = [run["health"] for run in runs if run["row"] == row.name]
        if own:
            cells = [f"{_mean_of(own, 'before', name)}, {_mean_of(own, 'after', name)}" for name in names]
            lines.append([row.title, *cells])
    return table(["row", *(f"{HEALTH[name]}: before, after" for name in names)], lines)


def _mean_of(healths: list[dict[str, Any]], when: str, name: str) -> str:
    values = [value for health in healths for key, value in health[when].items() if name in key and value is not None]
    return f"{statistics.mean(values):.3g}" if values else "-"


def _host(scores: dict[str, dict[str, float]]) -> list[str]:
    tasks = list(next(iter(scores.values())))
    lines = [[name, *(f"{own[task]:.2f}" for task in tasks)] for name, own in scores.items()]
    return [*table(["the bare host on", *tasks], lines), ""]


def markdown(record: dict[str, Any]) -> str:
    """Write the record as tables."""
    runs, protocol = record["runs"], record["protocol"]
    environment, tasks = runs[0]["environment"], protocol["tasks"]
    commands = dict.fromkeys(f"`{run['environment']['command']}`" for run in runs)
    commits = sorted({str(run["environment"]["commit"])[:12] for run in runs})
    lines = ["# Ablation on phantoms", ""]
    lines += [
        f"{', '.join(commands)}, commit {', '.join(commits)}, {environment['device']}, "
        f"torch {environment['versions']['torch']}, transformers {environment['versions']['transformers']}.",
        f"Phantoms of {protocol['size']} px with lesions of {protocol['radius'][0]} to {protocol['radius'][1]} px "
        f"radius; a frozen host of {protocol['host']['layers']} layers that sees 40 px; {protocol['steps']} steps of "
        f"{protocol['batch_size']}; {protocol['test_samples']} held-out questions a task; the share answered word for "
        "word: mean over seeds (lowest-highest). The paper's figures are BLEU-4 on real studies: compare the order of "
        "rows, not the numbers.",
        "",
        *_host(record["host"]),
    ]
    for key, title in TABLES.items():
        rows = [row for row in (*ROWS, *START_ROWS) if row.table == key]
        if not any(run["row"] == row.name for run in runs for row in rows):
            continue
        shown = rows if FULL in rows or key == "start" else [FULL, *rows]
        lines += [f"## {title}", "", *_table(runs, shown, tasks), ""]
    lines += ["## What the adapter does", "", *_health(runs, [*ROWS, *START_ROWS]), ""]
    seconds = [run["seconds_a_step"] for run in runs]
    side_by_side = f"{environment['jobs']} at a time, {environment['threads_a_run']} thread each"
    lines.append(f"A training step took {statistics.median(seconds):.2f} s (median over runs, {side_by_side}).")
    return "\n".join(lines) + "\n"


def draw(record: dict[str, Any]) -> Any:
    """Draw every row's score of each task: a bar for the mean, a dot a seed, a line for chance."""
    runs, tasks = record["runs"], record["protocol"]["tasks"]
    rows = [row for row in (*ROWS, *START_ROWS) if any(run["row"] == row.name for run in runs)]
    figure, axes = new_figure(len(tasks), width=11.5 / len(tasks), height=0.7 + 0.42 * len(rows))
    for axis, task in zip(axes, tasks, strict=True):
        for place, row in enumerate(rows):
            values = scores_of(runs, row.name, task)
            axis.barh(place, statistics.mean(values), color=OURS if row is FULL else OTHERS, height=0.7)
            axis.plot(values, [place] * len(values), ".", color=INK, markersize=4)
        axis.axvline(CHANCE[task], color=LIMIT, linewidth=1, linestyle=":")
        finish(axis, task, "answered word for word", log="")
        axis.set_xlim(0, 1)
        axis.set_yticks(
            range(len(rows)), [row.title for row in rows] if axis is axes[0] else [""] * len(rows), fontsize=8
        )
        axis.invert_yaxis()
    figure.suptitle("Ablation on phantoms: bars are means, dots are seeds, dotted is chance", fontsize=10.5, color=INK)
    return figure


def write(record: dict[str, Any], folder: Path) -> None:
    """Write ablation.json, ablation.md and, with matplotlib, ablation.png."""
    write_json(folder / "ablation.json", record)
    write_text(folder / "ablation.md", markdown(record))
    if unavailable() is None:
        with replacing(folder / "ablation.png") as scratch:
            write_png(draw(record), scratch)
