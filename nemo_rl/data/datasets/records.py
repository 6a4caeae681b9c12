"""Records and sequences of items as data sets: what files, hub data sets and one's own code come down to."""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Annotated, Protocol, cast

from pydantic import Field, TypeAdapter, ValidationError

from nemo_rl.data.types import Chat, ChatPair, Message, Task
from nemo_rl.errors import DataError

_CHAT = TypeAdapter(Annotated[tuple[Message, ...], Field(min_length=1)])
_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")

type Record = Mapping[str, object]


class Records(Protocol):
    """Records by position, like a `datasets.Dataset`, which reads them when they are asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...


class Reader[Item](Protocol):
    """Turns records into items. It must pickle, and its `repr` must say how it reads."""

    def read(self, record: Record, index: int, where: str) -> Item:
        """Turn one record into item `index`.

        Raises:
            DataError: the record is malformed; it begins with `where`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Table:
    """Records and where they come from.

    Attributes:
        records: what holds them.
        source: how errors name them all.
        lines: in which line of the source each record stands; None where there are no lines.
    """

    records: Records
    source: str
    lines: Sequence[int] | None = None

    def where(self, index: int) -> str:
        """How errors name one record."""
        return f"{self.source}, record {index}" if self.lines is None else f"{self.source}, line {self.lines[index]}"

    def select(self, indices: Sequence[int]) -> "Table":
        """Keep these records."""
        lines = None if self.lines is None else [self.lines[index] for index in indices]
        return Table(_Selected(self.records, indices), self.source, lines)


@dataclass(frozen=True, slots=True)
class _Selected:
    """Some of the records."""

    records: Records
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.records[self.indices[index]]


@dataclass(frozen=True, slots=True)
class Unwanted:
    """Records that are left out: those whose field holds one of these values; `why` completes "they have ..."."""

    key: str
    values: tuple[object, ...]
    why: str

    def __call__(self, record: Record) -> bool:
        """Whether this record is left out."""
        return optional_field(record, self.key) in self.values


def joined(tables: Sequence[Table], source: str) -> Table:
    """Put tables one after the other."""
    return tables[0] if len(tables) == 1 else Table(_Joined([table.records for table in tables]), source)


@dataclass(frozen=True, slots=True)
class _Joined:
    """Records one after the other."""

    parts: Sequence[Records]
    ends: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", list(accumulate(len(part) for part in self.parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Record:
        part = bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]


@dataclass(frozen=True, slots=True)
class RecordFields:
    """How a record becomes a task.

    Attributes:
        prompt_key: field of the problem: a text (the user's message) or a list of messages in the OpenAI format.
        answer_key: field of the known answer, which becomes `extra["ground_truth"]` as text. All other fields reach the
            environment under their own names.
        environment: name of the environment that judges the answers.
        answer_after: where the known answer begins in its field, e.g. `#### ` of GSM8K: after the last such text.
        context_key: field of a text to put before a problem that is text, with a blank line between; None has none.
        settings: what the two keys are called where they are set; None where the data set fixes them.
    """

    prompt_key: str
    answer_key: str
    environment: str
    answer_after: str = ""
    context_key: str | None = None
    settings: tuple[str, str] | None = field(default=None, repr=False)  # changes no item, so no fingerprint

    def read(self, record: Record, index: int, where: str) -> Task:
        """Turn one record into task `index`.

        Raises:
            DataError: a field is missing, there is no answer in its field, or the prompt is neither text nor messages;
                it begins with `where`.
        """
        prompt_setting, answer_setting = self.settings or (None, None)
        prompt = field_of(record, self.prompt_key, where, setting=prompt_setting)
        if self.context_key is not None:
            prompt = f"{field_of(record, self.context_key, where, setting=None)}\n\n{prompt}"
        answer = str(field_of(record, self.answer_key, where, setting=answer_setting))
        if self.answer_after:
            _, found, answer = answer.rpartition(self.answer_after)
            if not found:
                raise DataError(
                    f"{where} has no {self.answer_after!r} in its {self.answer_key!r}, so no known answer; remove it"
                )
            answer = answer.strip()
        check_answer(answer, self.answer_key, where)
        others = {key: value for key, value in record.items() if key not in (self.prompt_key, self.answer_key)}
        return Task(messages_of(prompt, "user", where), self.environment, {**others, "ground_truth": answer}, index)


class RecordDataset[Item]:
    """Items made from records when they are asked for."""

    def __init__(self, table: Table, reader: Reader[Item]) -> None:
        """Look at the first record, or at every line of a file that has lines.

        Elsewhere the records further on are looked at by `fingerprint`, and when their items are asked for.

        Raises:
            DataError: there is no record, or one that was looked at is malformed.
        """
        check_not_empty(len(table.records), table.source)
        self._table = table
        self._reader = reader
        self._fingerprint: str | None = None
        for index in range(1 if table.lines is None else len(self)):
            self[index]

    def __len__(self) -> int:
        """Number of records."""
        return len(self._table.records)

    def __getitem__(self, index: int) -> Item:
        """Turn record `index` into an item.

        Raises:
            IndexError: the index is outside of the data set.
            DataError: the record is malformed.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._reader.read(self._table.records[index], index, self._table.where(index))

    @property
    def fingerprint(self) -> str:
        """Hash of all records and of how they are read.

        Raises:
            DataError: one of them is malformed.
        """
        if self._fingerprint is None:
            self._fingerprint = self._hash()
        return self._fingerprint

    def _hash(self) -> str:
        digest = hashlib.sha256(repr(self._reader).encode())
        for index in range(len(self)):
            record = self._table.records[index]
            if self._table.lines is None:
                self._reader.read(record, index, self._table.where(index))
            digest.update(told(record).encode())
        return digest.hexdigest()


class ItemSequence[Item: (Task, Chat, ChatPair)]:
    """A sequence of items as a data set; position i becomes the index of item i, all else stays as it is."""

    def __init__(self, items: Sequence[Item], *, source: str) -> None:
        """Take the items.

        Raises:
            DataError: there is none.
        """
        check_not_empty(len(items), source)
        self._items = items

    def __len__(self) -> int:
        """Number of items."""
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        """Item `index`."""
        return replace(self._items[index], index=index)

    @property
    def fingerprint(self) -> str:
        """Hash of all that the items say, their old indices left out."""
        digest = hashlib.sha256()
        for item in self._items:
            digest.update(told(asdict(replace(item, index=0))).encode())
        return digest.hexdigest()


def read_with_datasets(
    path: str, *, source: str, split: str, subset: str | None = None, data_files: str | None = None
) -> Records:
    """Call `datasets.load_dataset`; its many kinds of failure become one.

    Raises:
        DataError: the data set cannot be found or read.
    """
    from datasets import load_dataset

    with reading_errors(source, split), _without_bars():
        return cast("Records", load_dataset(path, subset, split=split, data_files=data_files))


@contextmanager
def _without_bars() -> Generator[None]:
    """Keep the progress bars of `datasets` off the terminal, which the run has its own for."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


@contextmanager
def reading_errors(source: str, split: str) -> Generator[None]:
    """Turn the many kinds of failure of `datasets` into one.

    Raises:
        DataError: the block raised one of them.
    """
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"the data set {source} (split {split!r}) cannot be read: {reason}") from error


def told(value: object) -> str:
    """Write a value the same way in every process: mappings and sets in order, objects without their address."""
    match value:
        case str():
            return repr(value)
        case Mapping():
            return f"{{{', '.join(sorted(f'{told(key)}: {told(item)}' for key, item in value.items()))}}}"
        case Set():
            return f"{{{', '.join(sorted(map(told, value)))}}}"
        case list() | tuple():
            return f"[{', '.join(map(told, value))}]"
        case _:
            return _ADDRESS.sub("", repr(value))


def check_not_empty(size: int, source: str) -> None:
    """Refuse a data set without items.

    Raises:
        DataError: there is none.
    """
    if not size:
        raise DataError(f"the data set {source} is empty; it needs at least one record")


def check_answer(answer: str, key: str, where: str) -> None:
    """Refuse a known answer, read in field `key`, that says nothing.

    Raises:
        DataError: it is blank; it begins with `where`.
    """
    if not answer.strip():
        raise DataError(f"{where} has an empty answer in its {key!r}; fill it in or remove the record")


def field_of(record: Record, key: str, where: str, *, setting: str | None) -> object:
    """Read a field that must be there and hold something; `a.b.0` leads into it.

    Raises:
        DataError: there is none; it begins with `where` and names the `setting` that chose it, if one did.
    """
    value = optional_field(record, key)
    if value is None:
        remedy = "correct or remove it" if setting is None else f"set {setting} to the field that holds it"
        raise DataError(f"{where} has no {key!r}, only {sorted(record)}; {remedy}")
    return value


def optional_field(record: Record, key: str | None) -> object:
    """Read a field that may be missing; `a.b.0` leads into it."""
    if key is None or key in record:
        return None if key is None else record[key]
    value: object = record
    for step in key.split("."):
        match value:
            case Mapping():
                value = value.get(step)
            case list() | tuple() if step.isdecimal() and int(step) < len(value):
                value = value[int(step)]
            case _:
                return None
    return value


def messages_of(value: object, role: str, where: str) -> tuple[Message, ...]:
    """Read chat messages, or text that becomes the message of `role`.

    Raises:
        DataError: it is neither; it begins with `where`.
    """
    if isinstance(value, str) and value.strip():
        return (Message(role=role, content=value),)
    try:
        return _CHAT.validate_python([_said(turn) for turn in value] if isinstance(value, list | tuple) else value)
    except ValidationError as error:
        kind = "a prompt" if role == "user" else "a conversation or an answer"
        raise DataError(
            f"{where} has {kind} that is neither text nor a list of messages with role and content; correct it"
        ) from error


def _said(turn: object) -> object:
    """Drop what a message leaves empty; the words beside tool calls may be."""
    if not isinstance(turn, Mapping):
        return turn
    filled = {key: value for key, value in turn.items() if value is not None}
    return {"content": "", **filled} if "tool_calls" in filled else filled
