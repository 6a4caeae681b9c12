"""`nemo-rl explain KEY`: what the schema says about a setting or a section."""

import inspect
import json
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, Literal, TypeAliasType, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, JsonValue
from pydantic.fields import FieldInfo

from nemo_rl.config.fields import find, nearest, sections
from nemo_rl.errors import ConfigError


def explain_any(key: str, roots: Mapping[str, type[BaseModel]]) -> str:
    """Describe a setting or section of whichever commands have it; what they say alike is said once.

    Args:
        key: dotted path; empty for the sections of all commands.
        roots: the schema of each command.

    Raises:
        ConfigError: no command has such a path; the message names the nearest one.
    """
    path = tuple(filter(None, key.split(".")))
    if not path:
        return _overview(roots)
    if texts := {command: explain(key, root) for command, root in roots.items() if find(root, path)}:
        told = _by_text(texts)
        return "\n\n".join(
            text if len(told) == 1 else f"{', '.join(commands)}:\n{text}" for text, commands in told.items()
        )
    likely = [root for root in roots.values() if path[0] in root.model_fields] or list(roots.values())
    close = next(filter(None, (nearest(root, path) for root in likely)), None)
    raise ConfigError(f"there is no setting {key}: {f'did you mean {close}?' if close else 'try `nemo-rl explain`'}")


def _overview(roots: Mapping[str, type[BaseModel]]) -> str:
    """The sections of all commands, those that not all have with the commands that do."""
    lines: list[str] = []
    for name in dict.fromkeys(name for root in roots.values() for name in root.model_fields):
        fields = {command: root.model_fields[name] for command, root in roots.items() if name in root.model_fields}
        for text, commands in _by_text({c: "\n".join(_setting(name, info)) for c, info in fields.items()}).items():
            lines += [text, *([f"    ({', '.join(commands)})"] if len(commands) < len(roots) else [])]
    return "\n".join(lines)


def _by_text(texts: Mapping[str, str]) -> dict[str, list[str]]:
    """The commands that share a text."""
    return {text: [command for command, own in texts.items() if own == text] for text in dict.fromkeys(texts.values())}


def explain(key: str, root: type[BaseModel]) -> str:
    """Describe a setting (type, default, documentation) or a section (the same for each of its fields).

    Args:
        key: dotted path, e.g. `policy.generation.temperature`; empty for the top level.
        root: the schema.

    Raises:
        ConfigError: the schema has no such path; the message names the nearest one.
    """
    path = tuple(filter(None, key.split(".")))
    if not path:
        return "\n".join(_section(root))
    settings = find(root, path)
    if not settings:
        close = nearest(root, path)
        raise ConfigError(
            f"there is no setting {key}: {f'did you mean {close}?' if close else 'try `nemo-rl explain`'}"
        )
    info = settings[0].info
    named = settings[0].name == path[-1]  # else the path ends in a name of the user's choice, inside the collection
    if not sections(info.annotation):
        return _across_variants(key, [setting.info for setting in settings])
    lines = _setting(key, info) if named else [f"{key}: {_phrase(info.annotation)}"]
    choices = sections(info.annotation)
    shared = _shared(choices) if len(choices) > 1 else {}
    if shared:
        lines += ["", "in each of them:", *_indented(shared)]
    for choice in choices:
        lines += ["", *_section(choice, without=shared.keys())]
    return "\n".join(lines)


def _shared(choices: Sequence[type[BaseModel]]) -> dict[str, FieldInfo]:
    """The fields that all variants of a union have, said in the same words."""
    first, *others = choices
    return {
        name: info
        for name, info in first.model_fields.items()
        if all(
            name in other.model_fields and _setting(name, other.model_fields[name]) == _setting(name, info)
            for other in others
        )
    }


def _section(section: type[BaseModel], without: Collection[str] = ()) -> list[str]:
    own = {name: info for name, info in section.model_fields.items() if name not in without}
    return [inspect.getdoc(section) or section.__name__, *_indented(own)]


def _indented(fields: Mapping[str, FieldInfo]) -> list[str]:
    return [f"  {line}" for name, info in fields.items() for line in _setting(name, info)]


def _across_variants(key: str, infos: list[FieldInfo]) -> str:
    """A field of several variants of a union: what they agree on is said once."""
    phrases: dict[tuple[str, ...], list[str]] = {}
    for info in infos:
        phrases.setdefault((_default(info), *_documentation(info)), []).append(_type(info))
    return "\n\n".join(
        "\n".join([f"{key}: {' | '.join(dict.fromkeys(types))}{default}", *documentation])
        for (default, *documentation), types in phrases.items()
    )


def _setting(name: str, info: FieldInfo) -> list[str]:
    return [f"{name}: {_type(info)}{_default(info)}", *_documentation(info)]


def _documentation(info: FieldInfo) -> list[str]:
    return textwrap.wrap(
        " ".join((info.description or "").split()), 100, initial_indent="    ", subsequent_indent="    "
    )


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return ", required"
    value = info.get_default(call_default_factory=True)
    return "" if isinstance(value, BaseModel) else f", default {json.dumps(value, default=sorted)}"


def _type(info: FieldInfo) -> str:
    return _phrase(info.annotation) + _bounds(info.metadata)


_WORDS: dict[Any, str] = {
    int: "integer",
    float: "number",
    bool: "true | false",
    str: "text",
    NoneType: "null",
    JsonValue: "any value",
}


def _phrase(annotation: Any) -> str:
    """A type in the words of YAML, with its bounds."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    if isinstance(annotation, TypeAliasType):
        return _phrase(annotation.__value__)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _phrase(parts[0]) + "".join(_bounds(part.metadata) for part in parts[1:] if isinstance(part, FieldInfo))
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (list, tuple, frozenset):
        return f"[{_phrase(parts[0])}, ...]"
    if origin is dict:
        return f"{{{'NAME' if parts[0] is str else _phrase(parts[0])}: {_phrase(parts[1])}}}"
    return " | ".join(dict.fromkeys(map(_phrase, parts)))


def _bounds(metadata: Iterable[object]) -> str:
    def text(bound: object) -> str:
        match bound:
            case Ge(ge=value):
                return f" >= {value}"
            case Gt(gt=value):
                return f" > {value}"
            case Le(le=value):
                return f" <= {value}"
            case Lt(lt=value):
                return f" < {value}"
            case _:
                return ""

    return "".join(map(text, metadata))
