"""Finding settings in a schema: by path, by name, by closeness."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAliasType, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of the schema: the section class that declares it, its name there and pydantic's description."""

    section: type[BaseModel]
    name: str
    info: FieldInfo


def sections(annotation: Any) -> tuple[type[BaseModel], ...]:
    """All section classes that a value of this annotation can hold, in order of declaration."""
    if isinstance(annotation, TypeAliasType):
        return sections(annotation.__value__)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    parts = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    return tuple(section for part in parts for section in sections(part))


def is_collection(annotation: Any) -> bool:
    """Whether the next part of a path is a name of the user's choice (`env.NAME`) or a position in a list."""
    return get_origin(annotation) in (dict, list, tuple)


def find(root: type[BaseModel], path: Sequence[str]) -> list[Setting]:
    """All settings a dotted path can mean, one per variant of a union that knows it; none for an unknown path."""
    candidates: tuple[type[BaseModel], ...] = (root,)
    found: list[Setting] = []
    named = False
    for part in path:
        if named:
            named = False
            continue
        found = [
            Setting(section, part, section.model_fields[part]) for section in candidates if part in section.model_fields
        ]
        candidates = tuple(dict.fromkeys(child for setting in found for child in sections(setting.info.annotation)))
        named = any(is_collection(setting.info.annotation) for setting in found)
    return found


def fields_at(root: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The names that may stand below a section, those of all its variants together."""
    choices = (
        (root,) if not path else tuple(c for setting in find(root, path) for c in sections(setting.info.annotation))
    )
    return list(dict.fromkeys(name for choice in choices for name in choice.model_fields))


def variant(root: type[BaseModel], path: Sequence[str], values: Mapping[str, Any]) -> type[BaseModel] | None:
    """The class that the discriminator in `values` chooses at `path`; None where there is no choice or none is made."""
    found = find(root, path)
    choices = sections(found[0].info.annotation) if found else ()
    if len(choices) < 2:
        return None
    for choice in choices:
        for name, info in choice.model_fields.items():
            if (
                get_origin(info.annotation) is Literal
                and info.is_required()
                and values.get(name) in get_args(info.annotation)
            ):
                return choice
    return None


def walk(root: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all settings, depth first; a name of the user's choice stands as `NAME`."""
    for name, info in root.model_fields.items():
        path = (*prefix, name)
        yield path
        inner = (*path, "NAME") if is_collection(info.annotation) else path
        for section in sections(info.annotation):
            yield from walk(section, inner)


def nearest(root: type[BaseModel], path: Sequence[str]) -> str | None:
    """The dotted path that `path` was most likely meant to be, or None if nothing is close.

    A sibling with a similar name comes first, then the same name in another section, then the closest whole path.
    """
    known = list(dict.fromkeys(walk(root)))
    *parent, last = path
    depth = len(parent)
    siblings = {key[-1]: key for key in known if len(key) == depth + 1 and _same(key[:-1], parent)}
    if close := difflib.get_close_matches(last, siblings, n=1):
        return ".".join((*parent, close[0]))
    if elsewhere := [key for key in known if key[-1] == last]:
        return ".".join(elsewhere[0])
    close = difflib.get_close_matches(".".join(path), [".".join(key) for key in known], n=1)
    return close[0] if close else None


def _same(pattern: Sequence[str], path: Sequence[str]) -> bool:
    return all(part in ("NAME", actual) for part, actual in zip(pattern, path, strict=True))
