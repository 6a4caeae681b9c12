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
    place, _, name = path.rpartition(":")
    if not (place and name.isidentifier()):
        raise ConfigError(f"{kind} {path!r} must be `package.module:name` or `path/to/file.py:name`")
    try:
        module = _module_from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{kind} {path!r} cannot be imported: {type(error).__name__}: {error}") from error
    found = vars(module).get(name)
    if not callable(found):
        raise ConfigError(f"{kind} {path!r} does not exist: {place} defines no function {name!r}")
    return found


def _module_from_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
