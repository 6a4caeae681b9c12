"""Files on this machine, one record for each item."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from nemo_rl.data.datasets.records import Record, Table, read_with_datasets
from nemo_rl.errors import DataError

_BUILDERS: Mapping[str, str] = {".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


def open_local(path: str | Path) -> Table:
    """Read a `.jsonl`, `.json`, `.csv`, `.parquet` or `.arrow` file.

    Raises:
        DataError: the file is missing, unreadable or of another kind, or a line of a JSONL file is no record.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"the data file {path} does not exist; check the path in the data section")
    if path.suffix == ".jsonl":
        numbered = list(_read_jsonl(path))
        return Table([record for _, record in numbered], str(path), [number for number, _ in numbered])
    builder = _BUILDERS.get(path.suffix)
    if builder is None:
        raise DataError(f"the data file {path} is of an unknown kind; use .jsonl, {', '.join(_BUILDERS)}")
    return Table(read_with_datasets(builder, source=str(path), data_files=str(path), split="train"), str(path))


def _read_jsonl(path: Path) -> Iterator[tuple[int, Record]]:
    """Number and record of every line that is not blank."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where} is not JSON in UTF-8 ({error}); correct or remove it") from error
            if not isinstance(record, dict):
                raise DataError(f"{where} is not a JSON object; write one object with named fields on each line")
            yield number, record
