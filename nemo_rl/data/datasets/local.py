"""Data sets in a file on this machine, one record for each task."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from nemo_rl.data.datasets.records import Record, RecordDataset, RecordFields, TaskSequence, read_with_datasets
from nemo_rl.data.types import TaskDataset
from nemo_rl.errors import DataError

_BUILDERS: Mapping[str, str] = {".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_local(path: str | Path, fields: RecordFields) -> TaskDataset:
    """Read a `.jsonl`, `.json`, `.csv` or `.parquet` file; every line of a JSONL file is checked now.

    Raises:
        DataError: the file is missing, empty, unreadable or of another kind, or a record is malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"the data file {path} does not exist; check the path in the data section")
    if path.suffix == ".jsonl":
        tasks = [fields.task(record, index, where) for index, (where, record) in enumerate(_read_jsonl(path))]
        return TaskSequence(tasks, source=str(path))
    builder = _BUILDERS.get(path.suffix)
    if builder is None:
        raise DataError(f"the data file {path} is of an unknown kind; use .jsonl, {', '.join(_BUILDERS)}")
    records = read_with_datasets(builder, source=str(path), data_files=str(path), split="train")
    return RecordDataset(records, fields, source=str(path))


def _read_jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    """Where it stands and the record, for every line that is not blank."""
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
            yield where, record
