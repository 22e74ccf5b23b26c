"""Tables in Markdown. `DataFrame.to_markdown` would need pandas and tabulate for these few lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]], text: Iterable[str | int] = (0,)) -> list[str]:
    """Return the lines of a table.

    Args:
        header: the columns' names.
        rows: their cells.
        text: columns, by name or number, that are aligned to the left; the others hold numbers.
    """
    left = set(text)
    rule = ["---" if name in left or number in left else "---:" for number, name in enumerate(header)]
    return [row(line) for line in (header, rule, *rows)]


def row(cells: Iterable[object]) -> str:
    """Return one line of a table, with what would end a cell escaped."""
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
