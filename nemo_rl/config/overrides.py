"""Settings from the command line, in Hydra's override grammar."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from nemo_rl.config.sources import Key, Tree, keys_of
from nemo_rl.errors import ConfigError

COMMAND_LINE = "command line"


def apply_overrides(tree: Tree, overrides: Sequence[str], schema: type[BaseModel]) -> None:
    """Change `tree` by each override in turn.

    `a.b=c`, `+a.b=c` and `++a.b=c` set a key: which keys exist is the schema's knowledge, so Hydra's difference between
    changing and adding has no meaning here. A dict is merged into the section. `~a.b` takes a key back to its default.

    Raises:
        ConfigError: an override does not parse, or asks for a sweep.
    """
    if not overrides:
        return
    from hydra.core.override_parser.overrides_parser import OverridesParser  # takes a third of a second
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ConfigError(
                f"the override {text!r} does not parse: write key.subkey=value, with quotes around a value of several"
                " words or nested ${...}, or ~key.subkey"
            ) from error
        if override.is_sweep_override():
            raise ConfigError(f"the override {text!r} asks for several runs: give one value")
        key = tuple(override.key_or_group.split("."))
        if override.is_delete():
            _remove(tree, key)
        else:
            _assign(tree, key, override.value(), schema)


def _assign(tree: Tree, key: Key, value: Any, schema: type[BaseModel]) -> None:
    nested = value
    for part in reversed(key):
        nested = {part: nested}
    tree.update(Tree(nested, dict.fromkeys([key, *keys_of(value, key)], COMMAND_LINE)), schema)


def _remove(tree: Tree, key: Key) -> None:
    section: Any = tree.values
    for part in key[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    if not isinstance(section, dict) or key[-1] not in section:
        raise ConfigError(f"the override '~{'.'.join(key)}' removes a key that is not written: leave it out")
    del section[key[-1]]
