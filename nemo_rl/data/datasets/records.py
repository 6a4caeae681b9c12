"""Records and sequences of tasks as data sets: what files, hub data sets and one's own code come down to."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Protocol, cast

from pydantic import Field, TypeAdapter, ValidationError

from nemo_rl.data.types import Message, Task
from nemo_rl.errors import DataError

_CHAT = TypeAdapter(Annotated[tuple[Message, ...], Field(min_length=1)])

type Record = Mapping[str, object]


class Records(Protocol):
    """Records by position, like a `datasets.Dataset`, which reads them when they are asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...


@dataclass(frozen=True, slots=True)
class RecordFields:
    """How a record becomes a task.

    Attributes:
        prompt_key: field of the problem: a text (the user's message) or a list of messages in the OpenAI format.
        answer_key: field of the known answer, which becomes `extra["ground_truth"]` as text. All other fields reach the
            environment under their own names.
        environment: name of the environment that judges the answers.
    """

    prompt_key: str
    answer_key: str
    environment: str

    def task(self, record: Record, index: int, where: str) -> Task:
        """Turn one record into task `index`.

        Raises:
            DataError: a field is missing, or the prompt is neither text nor messages; it begins with `where`.
        """
        prompt = _field(record, self.prompt_key, where, setting="prompt_key")
        answer = _field(record, self.answer_key, where, setting="answer_key")
        others = {key: value for key, value in record.items() if key not in (self.prompt_key, self.answer_key)}
        extra = {**others, "ground_truth": str(answer)}
        return Task(_messages(prompt, where), self.environment, extra, index)


class RecordDataset:
    """Tasks made from records when they are asked for."""

    def __init__(self, records: Records, fields: RecordFields, *, source: str) -> None:
        """Look at the first record; one that is malformed further on shows when its task is asked for.

        Args:
            records: what holds them.
            fields: how to read one.
            source: how errors name the data set.

        Raises:
            DataError: there is no record, or the first one is malformed.
        """
        _check_not_empty(len(records), source)
        self._records = records
        self._fields = fields
        self._source = source
        self[0]

    def __len__(self) -> int:
        """Number of records."""
        return len(self._records)

    def __getitem__(self, index: int) -> Task:
        """Turn record `index` into a task.

        Raises:
            IndexError: the index is outside of the data set.
            DataError: the record is malformed.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._fields.task(self._records[index], index, f"{self._source}, record {index}")

    @property
    def fingerprint(self) -> str:
        """Hash of all records and of how they are read."""
        digest = hashlib.sha256(repr(self._fields).encode())
        for index in range(len(self)):
            digest.update(json.dumps(self._records[index], sort_keys=True, default=str).encode())
        return digest.hexdigest()


class TaskSequence:
    """A sequence of tasks as a data set; position i becomes the index of task i, all else stays as it is."""

    def __init__(self, tasks: Sequence[Task], *, source: str) -> None:
        """Take the tasks.

        Raises:
            DataError: there is none.
        """
        _check_not_empty(len(tasks), source)
        self._tasks = tasks

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self._tasks)

    def __getitem__(self, index: int) -> Task:
        """Task `index`."""
        return replace(self._tasks[index], index=index)

    @property
    def fingerprint(self) -> str:
        """Hash of what is asked and of what the environments are told."""
        digest = hashlib.sha256()
        for task in self._tasks:
            digest.update(repr((task.messages, task.environment, sorted(task.extra.items()))).encode())
        return digest.hexdigest()


def read_with_datasets(path: str, *, source: str, split: str, data_files: str | None = None) -> Records:
    """Call `datasets.load_dataset`; its many kinds of failure become one.

    Raises:
        DataError: the data set cannot be found or read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return cast("Records", load_dataset(path, split=split, data_files=data_files))
    except (OSError, ValueError, KeyError, TypeError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"the data set {source} (split {split!r}) cannot be read: {reason}") from error


def _check_not_empty(size: int, source: str) -> None:
    if not size:
        raise DataError(f"the data set {source} is empty; it needs at least one task")


def _field(record: Record, key: str, where: str, *, setting: str) -> object:
    """Read a field that must be there and hold something."""
    if record.get(key) is None:
        raise DataError(f"{where} has no {key!r}, only {sorted(record)}; set {setting} to the field that holds it")
    return record[key]


def _messages(prompt: object, where: str) -> tuple[Message, ...]:
    """Read a prompt that is text, or a list of chat messages."""
    if isinstance(prompt, str) and prompt.strip():
        return (Message(role="user", content=prompt),)
    try:
        return _CHAT.validate_python(prompt)
    except ValidationError as error:
        raise DataError(
            f"{where} has a prompt that is neither text nor a list of messages with role and content; correct it"
        ) from error
