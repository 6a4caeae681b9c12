"""Code of one's own, named by import path: a callable that returns a data set, or one that reads a record."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from nemo_rl.data.datasets.records import ItemSequence, Record
from nemo_rl.data.types import Chat, ChatPair, Task
from nemo_rl.errors import DataError
from nemo_rl.import_path import load_callable


def load_custom[Item: (Task, Chat, ChatPair)](
    path: str, kwargs: Mapping[str, object], kind: type[Item]
) -> ItemSequence[Item]:
    """Call `package.module:name` or `path/to/file.py:name`, which returns a sequence of `kind`.

    Raises:
        ConfigError: there is no such callable.
        DataError: it raises, or returns something else.
    """
    build = load_callable(path, "data set")
    try:
        found = build(**kwargs)
    except Exception as error:
        raise DataError(f"the data set {path} raised {type(error).__name__}: {error}") from error
    items = [item for item in found if isinstance(item, kind)] if isinstance(found, Sequence) else []
    if not isinstance(found, Sequence) or len(items) < len(found):
        raise DataError(
            f"the data set {path} returned {type(found).__name__}; it must return a sequence of {kind.__name__}"
        )
    return ItemSequence(items, source=path)


@dataclass(frozen=True, slots=True)
class ProcessedReader[Item: (Task, Chat, ChatPair)]:
    """Reads records with the callable `package.module:name` or `path/to/file.py:name`, which returns a `kind`."""

    path: str
    kind: type[Item]

    def read(self, record: Record, index: int, where: str) -> Item:
        """Turn one record into item `index`.

        Raises:
            ConfigError: there is no such callable.
            DataError: it raises, or returns something else; it begins with `where`.
        """
        process = _processor(self.path)
        try:
            item = process(dict(record))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{where} cannot be read by the processor {self.path}, which raised {reason}") from error
        if not isinstance(item, self.kind):
            raise DataError(
                f"{where} became {type(item).__name__} in the processor {self.path}; it must return "
                f"{self.kind.__name__}"
            )
        return replace(item, index=index)


@cache
def _processor(path: str) -> Callable[..., Any]:
    return load_callable(path, "processor")
