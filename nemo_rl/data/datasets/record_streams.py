"""Records that are read as they are needed, from a place that can be saved: lines, and what `datasets` reads."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, cast

from nemo_rl.data.datasets.local import builder_of, parse_line
from nemo_rl.data.datasets.records import Record, reading_errors
from nemo_rl.errors import DataError


class Cursor(Iterator[tuple[str, Record]], Protocol):
    """Records from a place on, each with how errors name it."""

    def state_dict(self) -> dict[str, Any]:
        """The place after the last record: plain numbers and strings."""
        ...


class RecordStream(Protocol):
    """Where records come from. It must pickle, for loader processes."""

    @property
    def source(self) -> str:
        """How errors name it."""
        ...

    @property
    def num_bytes(self) -> int:
        """Size of the file; 0 where it is unknown."""
        ...

    def open(self, state: Mapping[str, Any] | None = None) -> Cursor:
        """Begin at the first record, or where the cursor of that `state_dict` stood.

        Raises:
            DataError: it cannot be read.
        """
        ...


def stream_local(path: str | Path) -> RecordStream:
    """Read a `.jsonl`, `.json`, `.csv`, `.parquet` or `.arrow` file record by record.

    Raises:
        DataError: the file is missing or of another kind.
    """
    builder = builder_of(path)
    return LineStream(str(path)) if builder is None else DatasetsStream(builder, str(path), data_files=str(path))


@dataclass(frozen=True, slots=True)
class LineStream:
    """A JSONL file."""

    source: str

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return Path(self.source).stat().st_size

    def open(self, state: Mapping[str, Any] | None = None) -> "_Lines":
        """See `RecordStream`."""
        return _Lines(self.source, **(state or {}))


class _Lines:
    """The records of a JSONL file from a line on."""

    def __init__(self, path: str, *, offset: int = 0, number: int = 0) -> None:
        """Open the file behind `offset` bytes, which are `number` lines."""
        self._path = path
        self._offset = offset
        self._number = number
        try:
            self._file = Path(path).open("rb")  # noqa: SIM115  # read for as long as the cursor lives
        except OSError as error:
            raise DataError(f"the data file {path} cannot be read: {error.strerror}") from error
        self._file.seek(offset)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[str, Record]:
        while line := self._file.readline():
            self._offset += len(line)
            self._number += 1
            if line.strip():
                where = f"{self._path}, line {self._number}"
                return where, parse_line(line, where)
        self._file.close()
        raise StopIteration

    def __del__(self) -> None:
        self._file.close()

    def state_dict(self) -> dict[str, Any]:
        """See `Cursor`."""
        return {"offset": self._offset, "number": self._number}


@dataclass(frozen=True, slots=True)
class DatasetsStream:
    """What `datasets` reads record by record: other files, and data sets of the hub."""

    path: str
    source: str
    split: str = "train"
    subset: str | None = None
    data_files: str | None = None
    decode: bool = True
    """Whether images are opened; otherwise they are `{"bytes": ..., "path": ...}`."""

    @property
    def num_bytes(self) -> int:
        """Size of the file; 0 for the hub."""
        return 0 if self.data_files is None else Path(self.data_files).stat().st_size

    def open(self, state: Mapping[str, Any] | None = None) -> "_Rows":
        """See `RecordStream`."""
        return _Rows(self, **(state or {}))


class _Rows:
    """The records of a data set from a place on."""

    def __init__(self, stream: DatasetsStream, *, number: int = 0, dataset: Mapping[str, Any] | None = None) -> None:
        from datasets import load_dataset

        self._stream = stream
        self._number = number
        with reading_errors(stream.source, stream.split):
            loaded = load_dataset(
                stream.path, stream.subset, split=stream.split, data_files=stream.data_files, streaming=True
            )
            self._dataset = loaded if stream.decode else loaded.decode(False)
            if dataset is not None:
                self._dataset.load_state_dict(dict(dataset))
            self._rows = iter(self._dataset)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[str, Record]:
        with reading_errors(self._stream.source, self._stream.split):
            row = next(self._rows)
        self._number += 1
        return f"{self._stream.source}, record {self._number - 1}", cast("Record", row)

    def state_dict(self) -> dict[str, Any]:
        """See `Cursor`."""
        return {"number": self._number, "dataset": self._dataset.state_dict()}
