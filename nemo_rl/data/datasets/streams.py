"""Items of data that are not held: a bounded buffer shuffles them, and a walk through them resumes exactly.

A pass is cut into blocks of `buffer_size` records, and each block is shuffled by (seed, pass, block) alone. So a place
is known by where its block begins and how much of that was taken: a resumed walk reads the block again and continues.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any, NamedTuple, Self

from nemo_rl.data.datasets.record_streams import RecordStream
from nemo_rl.data.datasets.records import Reader, Record, Unwanted, told
from nemo_rl.data.types import ItemDataset
from nemo_rl.errors import DataError

_NUM_KNOWN_BY = 64
"""Records by which a stream is known again."""


@dataclass(frozen=True, slots=True)
class ItemStream[Item]:
    """Items made from records as they are read; item i is made of record i.

    Attributes:
        records: where they come from.
        reader: how a record becomes an item.
        buffer_size: records that are held to shuffle them.
        unwanted: which records are left out.
    """

    records: RecordStream
    reader: Reader[Item]
    buffer_size: int
    unwanted: Unwanted | None = None

    def walk(self, *, seed: int | None, shard: int = 0, num_shards: int = 1) -> "Walk[Item]":
        """Begin at the first item of a shard, which has every `num_shards`-th record; None for `seed` keeps the order.

        Raises:
            DataError: the data cannot be read.
        """
        return Walk(self, seed, shard, num_shards)

    def once(self) -> Iterator[Item]:
        """All items in order.

        Raises:
            DataError: a record is malformed.
        """
        for found in _Pass(self, 0, 1, {}):
            yield self.reader.read(found.record, found.position, found.where)

    @property
    def description(self) -> dict[str, Any]:
        """Equal for what looks like the same data read in the same way: the size of a file, and the first records."""
        digest = hashlib.sha256(repr((self.reader, self.unwanted, self.records.num_bytes)).encode())
        for _, record in islice(self.records.open(), _NUM_KNOWN_BY):
            digest.update(told(record).encode())
        return {"fingerprint": digest.hexdigest(), "buffer_size": self.buffer_size}


type Source[Item] = ItemDataset[Item] | ItemStream[Item]
"""Where items come from, held or not."""


class Walk[Item]:
    """Endless items of a stream, each with the number of passes over its shard that it completes."""

    def __init__(self, stream: ItemStream[Item], seed: int | None, shard: int, num_shards: int) -> None:
        """See `ItemStream.walk`."""
        self._stream = stream
        self._seed = seed
        self._shard = shard
        self._num_shards = num_shards
        self._block: list[_Found] = []
        self._awaited: dict[str, Any] | None = {"num_passes": 0, "begin": {}, "num_taken": 0}

    def __iter__(self) -> Self:
        """A walk is its own, endless iterator."""
        return self

    def __next__(self) -> tuple[Item, int]:
        """Take the next item.

        Raises:
            DataError: its record is malformed, or the shard has no record.
        """
        if self._awaited is not None:
            self._go_to(self._awaited)
        if self._num_taken == len(self._block):
            self._read_block()
        found = self._block[self._num_taken]
        self._num_taken += 1
        is_last = self._num_taken == len(self._block) and not self._ahead
        item = self._stream.reader.read(found.record, found.position, found.where)
        return item, self._num_passes + is_last

    def state_dict(self) -> dict[str, Any]:
        """The place after the last item: plain numbers and strings."""
        if self._awaited is not None:
            return self._awaited
        return {"num_passes": self._num_passes, "begin": self._begin, "num_taken": self._num_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`: the block at hand is read again when the next item is asked for."""
        self._awaited = state

    def _go_to(self, state: dict[str, Any]) -> None:
        self._num_passes: int = state["num_passes"]
        self._next_begin: dict[str, Any] = state["begin"]
        self._records = _Pass(self._stream, self._shard, self._num_shards, self._next_begin)
        self._ahead: list[_Found] = list(islice(self._records, 1))
        self._fill()
        self._num_taken: int = state["num_taken"]
        self._awaited = None

    def _read_block(self) -> None:
        if not self._ahead:
            self._num_passes += bool(self._block)
            self._next_begin = {}
            self._records = _Pass(self._stream, self._shard, self._num_shards, {})
            self._ahead = list(islice(self._records, 1))
        self._fill()
        if not self._block:
            source, count = self._stream.records.source, self._num_shards
            what = "is empty" if count == 1 else f"has no record for each of data.num_workers = {count}"
            raise DataError(f"the data set {source} {what}; it needs at least {count}")

    def _fill(self) -> None:
        """Read the block that begins with the record read ahead, and the record behind it."""
        self._begin, self._num_taken = self._next_begin, 0
        self._block = [*self._ahead, *islice(self._records, self._stream.buffer_size - len(self._ahead))]
        self._next_begin = self._records.state_dict()
        self._ahead = list(islice(self._records, 1))
        if self._seed is not None and self._block:
            Random(f"{self._seed}/{self._num_passes}/{self._block[0].position}").shuffle(self._block)


class _Found(NamedTuple):
    """A record, its place among all records of a pass, and how errors name it."""

    position: int
    where: str
    record: Record


class _Pass:
    """The records of a shard in one pass, in order."""

    def __init__(self, stream: ItemStream[Any], shard: int, num_shards: int, begin: Mapping[str, Any]) -> None:
        """Begin at the first record, or where `state_dict` was taken."""
        self._unwanted = stream.unwanted
        self._shard = shard
        self._num_shards = num_shards
        self._index: int = begin.get("index", 0)
        self._cursor = stream.records.open(begin.get("cursor"))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> _Found:
        while True:
            where, record = next(self._cursor)
            index = self._index
            self._index += 1
            if index % self._num_shards == self._shard and not (self._unwanted and self._unwanted(record)):
                return _Found(index, where, record)

    def state_dict(self) -> dict[str, Any]:
        return {"index": self._index, "cursor": self._cursor.state_dict()}


def held[Item](source: Source[Item], what: str) -> ItemDataset[Item]:
    """Insist on a data set that is held.

    Raises:
        DataError: it is a stream; `what` says what cannot be done with one.
    """
    if isinstance(source, ItemStream):
        raise DataError(f"{what} a streamed data set ({source.records.source}); set its streaming to false")
    return source
