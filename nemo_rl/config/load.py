"""From a YAML file and a command line to a validated configuration."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nemo_rl.config.fields import fields_at, nearest
from nemo_rl.config.interpolation import interpolate
from nemo_rl.config.nemo.translate import translate
from nemo_rl.config.overrides import apply_overrides
from nemo_rl.config.schema.base import CommandConfig, Section
from nemo_rl.config.sources import Dumper, Key, Tree, read_tree
from nemo_rl.errors import ConfigError

_LINE_BREAKS = "\x85\u2028\u2029"


@dataclass(frozen=True, slots=True)
class LoadedConfig[C: Section]:
    """A valid configuration and where it came from.

    Attributes:
        config: the configuration.
        sources: for every dotted key that was written, its `file:line` or `command line`; the others hold defaults.
        notes: what of a NeMo RL configuration is ignored or means something else here.
    """

    config: C
    sources: Mapping[str, str]
    notes: tuple[str, ...] = ()


def load_config[C: CommandConfig](path: str | Path | None, overrides: Sequence[str], kind: type[C]) -> LoadedConfig[C]:
    """Read, merge, override, interpolate, translate from NeMo RL's keys and validate a configuration.

    Args:
        path: a YAML file or the name of a packaged recipe; None is the default recipe of `kind`.
        overrides: Hydra-style overrides, applied in order.
        kind: the schema, e.g. `GRPOConfig`.

    Raises:
        ConfigError: with the key, the place it was written and what to do.
    """
    tree = read_tree(kind.default_recipe if path is None else path, kind)
    apply_overrides(tree, overrides, kind)
    interpolate(tree, kind)
    notes = translate(tree, kind)
    config = validate(tree, kind)
    return LoadedConfig(config, {".".join(key): where for key, where in tree.written.items()}, notes)


def validate[C: Section](tree: Tree, kind: type[C]) -> C:
    """The configuration that `tree` describes.

    Raises:
        ConfigError: with the key, the place it was written and what to do.
    """
    try:
        return kind.model_validate(tree.values)
    except ValidationError as error:
        raise ConfigError(_explain(error, tree, kind)) from None


def dump_config(config: Section) -> str:
    """The whole configuration, defaults included, as YAML that loads to an equal one."""
    return dump_values(config.model_dump(mode="json"))


def dump_values(values: Mapping[str, Any]) -> str:
    """Resolved values as YAML that loads to equal ones."""
    values = _escaped(values)
    text = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    if set(text) & set(_LINE_BREAKS):  # PyYAML writes these as they are and reads them as ends of lines
        return yaml.dump(values, Dumper=Dumper, sort_keys=False, width=120)
    return text


def _escaped(values: Any) -> Any:
    """The same values with a backslash before every `${`, and those already there doubled, so that it stays text."""
    match values:
        case str():
            return re.sub(r"(\\*)\$\{", r"\1\1\\${", values)
        case dict():
            return {key: _escaped(value) for key, value in values.items()}
        case list():
            return [_escaped(value) for value in values]
        case _:
            return values


def _explain(error: ValidationError, tree: Tree, kind: type[Section]) -> str:
    """One clause per problem; misspelt keys alone where there are any, because the other problems follow from them."""
    problems = error.errors(include_url=False)
    misspelt = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    return "; ".join(dict.fromkeys(_clause(problem, tree, kind) for problem in misspelt or problems))


def _clause(problem: ErrorDetails, tree: Tree, kind: type[Section]) -> str:
    key, value = _key(problem, tree.values), problem["input"]
    name, where, context = ".".join(key), tree.where(key), problem.get("ctx", {})
    match problem["type"]:
        case "extra_forbidden":
            close = nearest(kind, key)
            known = ", ".join(fields_at(kind, key[:-1]))
            return f"unknown key {name} ({where}): {f'did you mean {close}?' if close else f'known here are {known}'}"
        case "missing":
            return f"{name} is missing{f' ({where})' if where else ''}: set it"
        case "conflict":
            written = [tree.written.get((*key, *relative.split("."))) for relative in context["keys"]]
            places = ", ".join(dict.fromkeys(place for place in written if place))
            return f"{context['reason']}{f' ({places})' if places else ''}"
        case "literal_error" if problem["loc"][-1] == "[key]":
            return f"unknown key {name} ({where}): use {context['expected']}"
        case "union_tag_not_found":
            tag = context["discriminator"].strip("'")
            return f"{name}.{tag} is missing ({where}): set it, `nemo-rl explain {name}` lists the choices"
        case "union_tag_invalid":
            tag, options = context["discriminator"].strip("'"), context["expected_tags"]
            key, value, demand = (*key, tag), context["tag"], f"must be one of {options}"
        case "literal_error":
            options = context["expected"]
            demand = f"must be {options}"
        case "model_type" | "model_attributes_type":
            options, demand = "", "must be a section with keys of its own"
        case _:
            options, demand = "", problem["msg"].replace("Input should", "must").replace("should", "must")
    choices = options.replace(" or ", ", ").replace("'", "").split(", ") if options else []
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{'.'.join(key)} = {value!r} ({tree.where(key) or 'default'}) {demand}{hint}"


def _key(problem: ErrorDetails, values: Any) -> Key:
    """The key a problem is about: its location without the union tags that pydantic puts in between."""
    key: list[str] = []
    for part in problem["loc"]:
        if isinstance(values, list):
            values = dict(enumerate(values))
        if isinstance(values, dict) and part in values:
            values = values[part]
        elif problem["type"] != "missing" or part is not problem["loc"][-1]:
            continue
        key.append(str(part))
    return tuple(key)
