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
    builder, path = builder_of(path), Path(path)
    if builder is None:
        numbered = list(_read_jsonl(path))
        return Table([record for _, record in numbered], str(path), [number for number, _ in numbered])
    try:
        return Table(read_with_datasets(builder, source=str(path), data_files=str(path), split="train"), str(path))
    except DataError:
        if builder == "json":
            _name_the_line(path)
        raise


def builder_of(path: str | Path) -> str | None:
    """What `datasets` calls files of this kind; None for JSONL, which is read line by line.

    Raises:
        DataError: the file is missing or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"the data file {path} does not exist; check the path in the data section")
    if path.suffix == ".jsonl":
        return None
    if path.suffix not in _BUILDERS:
        raise DataError(f"the data file {path} is of an unknown kind; use .jsonl, {', '.join(_BUILDERS)}")
    return _BUILDERS[path.suffix]


def parse_line(line: bytes, where: str) -> Record:
    """Read a line of a JSONL file.

    Raises:
        DataError: it is not JSON, or not an object; it begins with `where`.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON in UTF-8 ({error}); correct or remove it") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object; write one object with named fields on each line")
    return record


def _read_jsonl(path: Path) -> Iterator[tuple[int, Record]]:
    """Number and record of every line that is not blank."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, parse_line(line, f"{path}, line {number}")


def _name_the_line(path: Path) -> None:
    """Find the line of a `.json` file that is no JSON, which `datasets` does not; some hold an object on each line.

    Raises:
        DataError: there is one.
    """
    try:
        json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            for _ in _read_jsonl(path):
                pass
        else:
            raise DataError(f"{path}, line {error.lineno} is not JSON ({error.msg}); correct it") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not JSON in UTF-8 ({error}); convert it") from error
