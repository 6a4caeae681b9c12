"""A data set of one's own: any callable that returns items, named by import path."""

from collections.abc import Mapping, Sequence

from nemo_rl.data.datasets.records import ItemSequence
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
