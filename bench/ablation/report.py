"""Tables and plot of the ablation's runs: mean and spread over seeds, the paper's figures beside them."""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .protocol import CHANCE, FULL, ROWS, START_ROWS, Row

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
    lines = ["| row | seeds | " + " | ".join(SHORT[task] for task in tasks) + " | mean | paper, B4 |"]
    lines.append("|---|---:|" + "---:|" * (len(tasks) + 2))
    for row in rows:
        seeds = sum(run["row"] == row.name for run in runs)
        if not seeds:
            continue
        columns = [scores_of(runs, row.name, task) for task in tasks]
        means = [statistics.mean(values) for values in zip(*columns, strict=True)]
        paper = " / ".join(map(str, PAPER.get(row.name, ())))
        cells = " | ".join(map(_cell, columns))
        lines.append(f"| {row.title} | {seeds} | {cells} | {_cell(means)} | {paper} |")
    chance = " | ".join(f"{CHANCE[task]:.2f}" for task in tasks)
    lines.append(f"| *chance* | | {chance} | {statistics.mean(CHANCE[task] for task in tasks):.2f} | |")
    return lines


def _health(runs: list[dict[str, Any]], rows: Sequence[Row]) -> list[str]:
    names = [name for name in HEALTH if any(name in key for run in runs for key in run["health"]["after"])]
    lines = ["| row | " + " | ".join(f"{HEALTH[name]}: before, after" for name in names) + " |"]
    lines.append("|---|" + "---:|" * len(names))
    for row in rows:
        own = [run["health"] for run in runs if run["row"] == row.name]
        if not own:
            continue
        cells = [f"{_mean_of(own, 'before', name)}, {_mean_of(own, 'after', name)}" for name in names]
        lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    return lines


def _mean_of(healths: list[dict[str, Any]], when: str, name: str) -> str:
    values = [value for health in healths for key, value in health[when].items() if name in key and value is not None]
    return f"{statistics.mean(values):.3g}" if values else "-"


def _host(scores: dict[str, dict[str, float]]) -> list[str]:
    tasks = list(next(iter(scores.values())))
    lines = ["| the bare host on | " + " | ".join(tasks) + " |", "|---|" + "---:|" * len(tasks)]
    lines += [f"| {name} | " + " | ".join(f"{own[task]:.2f}" for task in tasks) + " |" for name, own in scores.items()]
    return [*lines, ""]


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


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw every row's score of each task: a bar for the mean, a dot a seed, a line for chance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs, tasks = record["runs"], record["protocol"]["tasks"]
    rows = [row for row in (*ROWS, *START_ROWS) if any(run["row"] == row.name for run in runs)]
    figure = Figure(figsize=(11.5, 1.2 + 0.42 * len(rows)), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        for place, row in enumerate(rows):
            values = scores_of(runs, row.name, task)
            axis.barh(place, statistics.mean(values), color="#2b7a78" if row is FULL else "#9fc9c7", height=0.7)
            axis.plot(values, [place] * len(values), ".", color="#222222", markersize=4)
        axis.axvline(CHANCE[task], color="#c44e52", linewidth=1, linestyle=":")
        axis.set_title(task, fontsize=10)
        axis.set_xlim(0, 1)
        axis.set_xlabel("answered word for word", fontsize=8)
    axes[0].set_yticks(range(len(rows)), [row.title for row in rows], fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle("Ablation on phantoms: bars are means, dots are seeds, dotted is chance", fontsize=10.5)
    figure.savefig(path)


def write(record: dict[str, Any], folder: Path) -> None:
    """Write ablation.json, ablation.md and, with matplotlib, ablation.png."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        (Path(scratch) / "ablation.json").write_text(json.dumps(record, indent=1) + "\n")
        (Path(scratch) / "ablation.md").write_text(markdown(record))
        if importlib.util.find_spec("matplotlib"):
            draw(record, Path(scratch) / "ablation.png")
        for written in sorted(Path(scratch).iterdir()):
            written.replace(folder / written.name)
