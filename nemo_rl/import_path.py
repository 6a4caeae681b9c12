"""Callables that a user names by import path: reward functions, data sets."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_rl.errors import ConfigError


def load_callable(path: str, kind: str) -> Callable[..., Any]:
    """Import `package.module:name` or `path/to/file.py:name`.

    Args:
        path: where the callable is.
        kind: what it is, for messages, e.g. `reward function`.

    Raises:
        ConfigError: the path has another form, importing it raises, or there is no such callable.
    """
    found = _find(path, kind)
    if not callable(found):
        place, _, name = path.rpartition(":")
        raise ConfigError(f"{kind} {path!r} does not exist: {place} defines no function {name!r}")
    return found


def load_object(path: str, kind: str) -> Any:
    """Import whatever such a path names; arguments and errors are those of `load_callable`."""
    found = _find(path, kind)
    if found is None:
        place, _, name = path.rpartition(":")
        raise ConfigError(f"{kind} {path!r} does not exist: {place} defines no {name!r}")
    return found


def _find(path: str, kind: str) -> Any:
    """The object at a path, None if its module has no such name."""
    place, _, name = path.rpartition(":")
    if not (place and name.isidentifier()):
        raise ConfigError(f"{kind} {path!r} must be `package.module:name` or `path/to/file.py:name`")
    try:
        module = _module_from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{kind} {path!r} cannot be imported: {type(error).__name__}: {error}") from error
    return vars(module).get(name)


def _module_from_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
