"""Reading YAML so that every value remembers the file and line it was written on."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from nemo_rl.config.fields import variant
from nemo_rl.errors import ConfigError

type Key = tuple[str, ...]

RECIPES = Path(__file__).parent / "recipes"

REPLACE = "_override_"
"""A section with this key set to true replaces the one below it instead of being merged into it."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the floats of YAML 1.2: `1e-5` is a number."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Resolve `<<: *anchor` in place; what the mapping writes itself goes before what it merges."""
        super().flatten_mapping(node)
        node.value = list({name.value: (name, value) for name, value in node.value}.values())


class Dumper(yaml.SafeDumper):
    """Writes text that `_Loader` would read as a number in quotes."""


for _side in (_Loader, Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


@dataclass(slots=True)
class Tree:
    """A configuration before validation.

    Attributes:
        values: nested dicts and lists, as YAML has them.
        written: where each key (a path of parts) was written, `file:line` or `command line`.
    """

    values: dict[str, Any] = field(default_factory=dict[str, Any])
    written: dict[Key, str] = field(default_factory=dict[Key, str])

    def where(self, key: Key) -> str | None:
        """Where `key`, or else something inside it, or else the closest section around it, was written."""
        if key in self.written or not key:
            return self.written.get(key)
        inside = (where for other, where in self.written.items() if other[: len(key)] == key)
        return next(inside, None) or self.where(key[:-1])

    def update(self, other: "Tree", schema: type[BaseModel]) -> None:
        """Merge `other` on top: sections merge key by key, any other value is replaced.

        Where `other` chooses another variant of a union (`data.train.name: local`), keys only the former knows go.
        """
        _merge(schema, (), self.values, other.values)
        self.written.update(other.written)


def read_tree(file: str | Path, schema: type[BaseModel], *, chain: tuple[Path, ...] = ()) -> Tree:
    """Read a YAML file and, below it, the files its `defaults` name.

    `defaults` is one name or a list, later ones on top; a name without suffix is a recipe of the package, any other is
    relative to the file that names it.

    Raises:
        ConfigError: a file is missing, is no YAML mapping, writes a key twice or names itself through `defaults`.
    """
    path = _locate(file)
    if path.resolve() in chain:
        raise ConfigError(f"{path} names itself through 'defaults': break the circle")
    own = _parse(path)
    defaults = own.values.pop("defaults", [])
    names = [defaults] if isinstance(defaults, str) else defaults
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"'defaults' at {own.where(('defaults',))} must be a file name or a list of file names")
    tree = Tree()
    for name in names:
        base = path.parent / name if Path(name).suffix else name
        tree.update(read_tree(base, schema, chain=(*chain, path.resolve())), schema)
    tree.update(own, schema)
    return tree


def _locate(file: str | Path) -> Path:
    path = Path(file)
    if not path.suffix and not path.exists():
        recipes = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        if str(file) not in recipes:
            raise ConfigError(f"there is no recipe {str(file)!r}: use a YAML file or one of {', '.join(recipes)}")
        return RECIPES / f"{file}.yaml"
    if not path.is_file():
        raise ConfigError(f"the configuration file {path} does not exist: check --config and 'defaults'")
    return path


def _parse(path: Path) -> Tree:
    tree = Tree()
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return tree
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path} must hold a YAML mapping of sections")
        tree.values = _value(loader, node, (), str(path), tree.written)
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        line = f":{mark.line + 1}" if mark else ""
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        raise ConfigError(f"{path}{line} is not valid YAML: {problem}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return tree


def _value(loader: _Loader, node: yaml.Node, key: Key, file: str, written: dict[Key, str]) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, key, file, written)
    if isinstance(node, yaml.SequenceNode):
        items: list[Any] = []
        for index, item in enumerate(node.value):
            inner = (*key, str(index))
            written[inner] = f"{file}:{item.start_mark.line + 1}"
            items.append(_value(loader, item, inner, file, written))
        return items
    return loader.construct_object(node)


def _mapping(loader: _Loader, node: yaml.MappingNode, key: Key, file: str, written: dict[Key, str]) -> dict[str, Any]:
    lines: dict[str, int] = {}
    for name_node, _ in node.value:
        name, line = str(name_node.value), name_node.start_mark.line + 1
        if name in lines:
            raise ConfigError(
                f"{file}:{line} writes {'.'.join((*key, name))} again, after line {lines[name]}: keep one"
            )
        lines[name] = line
    loader.flatten_mapping(node)
    values: dict[str, Any] = {}
    for name_node, value_node in node.value:
        name = str(name_node.value)
        inner = (*key, name)
        written[inner] = f"{file}:{name_node.start_mark.line + 1}"
        values[name] = _value(loader, value_node, inner, file, written)
    return values


def _merge(schema: type[BaseModel], key: Key, base: dict[str, Any], top: dict[str, Any]) -> None:
    if (chosen := variant(schema, key, top)) and chosen is not variant(schema, key, base):
        for name in base.keys() - chosen.model_fields.keys():
            del base[name]
    for name, value in top.items():
        if isinstance(value, dict):
            replaces = value.pop(REPLACE, False)
            below = base.get(name)
            section = base[name] = {} if replaces or not isinstance(below, dict) else below
            _merge(schema, (*key, name), section, value)
        else:
            base[name] = value


def keys_of(values: Any, key: Key = ()) -> Iterator[Key]:
    """The keys of everything inside `values`, sections included."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for name, value in items:
        inner = (*key, str(name))
        yield inner
        yield from keys_of(value, inner)
