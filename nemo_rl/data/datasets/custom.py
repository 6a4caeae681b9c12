"""A data set of one's own: any callable that returns tasks, named by import path."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from nemo_rl.data.datasets.records import TaskSequence
from nemo_rl.data.types import Task
from nemo_rl.errors import ConfigError, DataError


def load_custom(path: str, kwargs: Mapping[str, object]) -> TaskSequence:
    """Call `package.module:name` or `path/to/file.py:name`; each task names its own environment.

    Raises:
        ConfigError: there is no such callable.
        DataError: it raises, or returns something else than tasks.
    """
    build = _load(path)
    try:
        found = build(**kwargs)
    except Exception as error:
        raise DataError(f"the data set {path} raised {type(error).__name__}: {error}") from error
    tasks = [task for task in found if isinstance(task, Task)] if isinstance(found, Sequence) else []
    if not isinstance(found, Sequence) or len(tasks) < len(found):
        raise DataError(f"the data set {path} returned {type(found).__name__}; it must return a sequence of Task")
    return TaskSequence(tasks, source=path)


def _load(path: str) -> Callable[..., object]:
    place, _, name = path.rpartition(":")
    try:
        module = _module_from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        found: object = vars(module)[name]
    except (Exception, SystemExit) as error:
        raise ConfigError(f"data set {path!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ConfigError(f"data set {path!r} is no callable; name a function that returns a sequence of Task")
    return found


def _module_from_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
