"""Reads what was measured of our own provider on a device, from its committed records."""

from __future__ import annotations

from ..records import files
from ..records.files import BadFile, read_json
from ..records.record import Measurement, read_records
from .collect import DTYPE

Key = tuple[str, str, str]  # op, case, mode


def measured(folder: str) -> dict[Key, Measurement]:
    """Read the latest measurement of each op or composite, case and mode; nothing where there is no folder.

    Args:
        folder: of the device, in ``bench/results``.

    Raises:
        BadFile: a file of records holds something else.
    """
    found: dict[Key, Measurement] = {}
    for path in sorted((files.RESULTS / folder).glob("*.json")):
        content = read_json(path)
        if not isinstance(content, dict) or "records" not in content:  # Table 3, an ablation
            continue
        try:
            records = read_records(path)
        except ValueError as error:
            raise BadFile(str(error)) from error
        for record in records:
            ours = record.provider == "hia" and record.dtype == DTYPE and record.device == "cuda"
            if not ours or record.status != "ok" or record.level == "end_to_end":
                continue
            key = record.op, record.case, record.mode
            if key not in found or _date(found[key]) <= _date(record):
                found[key] = record
    return found


def _date(record: Measurement) -> str:
    return str(record.environment.get("date", ""))
