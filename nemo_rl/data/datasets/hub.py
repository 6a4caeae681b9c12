"""Data sets of the Hugging Face hub, or local folders laid out like one."""

from dataclasses import dataclass
from typing import Any, cast

from nemo_rl.data.datasets.record_streams import DatasetsStream
from nemo_rl.data.datasets.records import Record, Table, read_with_datasets


def open_hub(path: str, *, split: str, subset: str | None = None, decode: bool = True) -> Table:
    """Load one split with `datasets`; rows stay on disk until they are asked for.

    Args:
        path: name on the hub, or a local folder.
        split: split of the data set, slices such as `train[:1%]` included.
        subset: subset (configuration) of the data set; None is its default.
        decode: whether images are opened; otherwise they are `{"bytes": ..., "path": ...}`.

    Raises:
        DataError: there is no such data set, subset or split.
    """
    source = _named(path, subset)
    records = read_with_datasets(path, source=source, split=split, subset=subset)
    return Table(records if decode else _Undecoded(records), f"{source} (split {split!r})")


def stream_hub(path: str, *, split: str, subset: str | None = None, decode: bool = True) -> DatasetsStream:
    """Read one split record by record; see `open_hub`. The split cannot be a slice."""
    source = f"{_named(path, subset)} (split {split!r})"
    return DatasetsStream(path, source, split=split, subset=subset, decode=decode)


@dataclass(frozen=True, slots=True)
class _Undecoded:
    """Rows of a `datasets.Dataset` as they are stored, so that images need no library."""

    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        return cast("Record", self.rows.with_format("arrow")[index : index + 1].to_pylist()[0])


def _named(path: str, subset: str | None) -> str:
    return path if subset is None else f"{path} (subset {subset!r})"
