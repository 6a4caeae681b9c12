"""`${policy.model_name}` and `${mul:a,b}` in values, resolved by OmegaConf."""

import math
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from nemo_rl.config.fields import is_collection, sections, variant
from nemo_rl.config.sources import Key, Tree
from nemo_rl.errors import ConfigError

type Number = int | float


def _quotient(a: Number, b: Number) -> Number:
    """The quotient, an integer when both are and it is whole."""
    return a // b if isinstance(a, int) and isinstance(b, int) and a % b == 0 else a / b


RESOLVERS: dict[str, Callable[..., Number]] = {
    "add": lambda *numbers: sum(numbers),
    "sub": lambda a, b: a - b,
    "mul": lambda *numbers: math.prod(numbers),
    "div": _quotient,
    "max": max,
    "min": min,
}
"""Arithmetic in values: `${mul:${grpo.num_prompts_per_step},4}`."""


def interpolate(tree: Tree, schema: type[BaseModel]) -> None:
    """Resolve all `${...}` in `tree`; a key that is not written stands for its default in the schema.

    Raises:
        ConfigError: an interpolation names no key, needs itself or does not compute.
    """
    if not any("${" in text for text in _texts(tree.values)):
        return
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for name, function in RESOLVERS.items():
        OmegaConf.register_new_resolver(name, function, replace=True)
    try:
        config = OmegaConf.create(_with_defaults(schema, (), schema, tree.values))
        tree.values = _as_written(OmegaConf.to_container(config, resolve=True), tree.values)
    except OmegaConfBaseException as error:
        path = str(error.full_key or "")
        where = tree.where(tuple(path.split("."))) or "unknown place"
        raise ConfigError(f"{path} ({where}) cannot be resolved: {str(error).splitlines()[0]}") from error


def _with_defaults(root: type[BaseModel], key: Key, section: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """`values` of `section` (found at `key` below `root`), completed by the defaults of what is not written."""
    complete = dict(values)
    for name, info in section.model_fields.items():
        inner, value = (*key, name), values.get(name, {})
        choices = sections(info.annotation)
        chosen = (
            variant(root, inner, value) if len(choices) > 1 and isinstance(value, dict) else next(iter(choices), None)
        )
        if chosen is None or is_collection(info.annotation):
            if name not in values and info.default is not PydanticUndefined:
                complete[name] = _plain(info.default)
        elif isinstance(value, dict) and (name in values or isinstance(info.default, BaseModel)):
            complete[name] = _with_defaults(root, inner, chosen, value)
    return complete


def _plain(default: Any) -> Any:
    """A default as YAML has it."""
    match default:
        case BaseModel():  # of a union
            return default.model_dump(mode="json")
        case frozenset():
            return sorted(default)
        case _:
            return default


def _as_written(resolved: Any, written: Any) -> Any:
    """The resolved values without the defaults that were there to be referred to."""
    if isinstance(resolved, dict) and isinstance(written, dict):
        return {key: _as_written(resolved[key], value) for key, value in written.items()}
    return resolved


def _texts(values: Any) -> list[str]:
    if isinstance(values, str):
        return [values]
    inner = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    return [text for value in inner for text in _texts(value)]
