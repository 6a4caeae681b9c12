"""From NeMo RL's YAML to the keys of today, with a word about each key that has none."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from nemo_rl.config.fields import fields_at, find, nearest, sections
from nemo_rl.config.nemo.actions import (
    NOTHING,
    Action,
    Add,
    Config,
    Convert,
    Ignore,
    Keep,
    Off,
    Only,
    Refuse,
    Rename,
    Set,
)
from nemo_rl.config.nemo.tables import DIALECTS, Dialect
from nemo_rl.config.sources import Key, Tree, keys_of
from nemo_rl.errors import ConfigError


def translate(tree: Tree, schema: type[BaseModel], algorithm: str | None = None) -> tuple[str, ...]:
    """Rewrite `tree`, whose interpolations are resolved, in the keys of today; a tree without old keys stays as it is.

    Args:
        tree: the configuration, changed in place.
        schema: what today's keys are.
        algorithm: which of NeMo RL's; None is the one whose section `schema` has.

    Returns:
        One note for each key that is ignored, or that means something else here.

    Raises:
        ConfigError: keys ask for what this version does not do, nobody knows them, or the algorithm is another one.
    """
    algorithm = algorithm or algorithm_of(schema.model_fields)
    if algorithm is None:
        return ()
    if (other := algorithm_of(tree.values)) not in (None, algorithm):
        raise ConfigError(
            f"{other} ({tree.where((other,))}) is the section of another algorithm: use `nemo-rl {other}`"
        )
    work = _Translation(tree, DIALECTS[algorithm], schema)
    if not any(work.is_old(key) for key in keys_of(tree.values)):
        return ()
    for name, value in tree.values.items():
        work.visit((name,), value)
    if work.problems:
        raise ConfigError("; ".join(work.problems))
    kept = set(keys_of(work.values))
    tree.written = {key: where for key, where in tree.written.items() if key in kept} | work.written
    tree.values = work.values
    return tuple(work.notes)


def algorithm_of(values: Mapping[str, Any]) -> str | None:
    """The algorithm that a configuration is for, by its own section."""
    return next((name for name in DIALECTS if name in values), None)


@dataclass(slots=True)
class _Translation:
    tree: Tree
    dialect: Dialect
    schema: type[BaseModel]
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    written: dict[Key, str] = field(default_factory=dict[Key, str])
    notes: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])

    def is_old(self, key: Key) -> bool:
        return self._rule(key) is not None and not self._is_known(key)

    def visit(self, key: Key, value: Any) -> None:
        """Apply the rule of `key`, or else look at what is inside."""
        name, where = ".".join(key), self.tree.where(key)
        action = self._decide(self._rule(key), value)
        match action:
            case Keep():
                self._put(key, value, key, replace=True)
            case Rename():
                self._put(tuple(action.new.split(".")), value, key)
            case Set():
                for new, new_value in action.values.items():
                    self._put(tuple(new.split(".")), new_value, key)
                if action.note:
                    self.notes.append(f"{name} ({where}): {action.note}")
            case Ignore():
                self.notes.append(f"{name} ({where}) is ignored: {action.reason}")
            case Refuse():
                self.problems.append(self._refusal(key, value, action))
            case Add() | None:
                for new, new_value in action.values.items() if action else ():
                    self._put(tuple(new.split(".")), new_value, key)
                self._look_inside(key, value)

    def _decide(self, action: Action | None, value: Any) -> Keep | Rename | Set | Add | Ignore | Refuse | None:
        """Follow the rules that depend on the value."""
        while True:
            match action:
                case Only():
                    action = NOTHING if any(value == harmless for harmless in action.values) else action.otherwise
                case Off():
                    action = action.otherwise if isinstance(value, dict) and value.get("enabled") else NOTHING
                case Convert():
                    action = action.function(value, Config(self.tree.values))
                    if not isinstance(action, Only | Off | Convert):
                        return action
                case _:
                    return action

    def _look_inside(self, key: Key, value: Any) -> None:
        has_rules = next(self._rules_below(key), None) is not None
        is_section = has_rules or self._is_section(key)
        if is_section and isinstance(value, dict) and value:
            for name, inner in value.items():
                self.visit((*key, name), inner)
        elif has_rules and isinstance(value, list) and value:  # of sections
            for place, section in enumerate(value):
                self._look_inside((*key, str(place)), section)
        elif self._is_known(key):
            self._put(key, value, key, replace=True)
        elif not has_rules or value:
            self.problems.append(self._unknown(key))

    def _put(self, key: Key, value: Any, source: Key, *, replace: bool = False) -> None:
        """Write a value; what is written under its own name goes before what another key stands for."""
        section = self.values
        for part in key[:-1]:
            section = section.setdefault(part, {})
        if replace or key[-1] not in section:
            section[key[-1]] = value
            if key != source and (where := self.tree.where(source)):
                self.written |= dict.fromkeys([key, *keys_of(value, key)], where)

    def _rule(self, key: Key) -> Action | None:
        """What the table says; that something is not there holds only while the schema has no such key."""
        table, name = self.dialect.table, _without_places(key)
        action = table.get(".".join(name)) or table.get(".".join((*name[:-1], "*")))
        outcome = action
        while isinstance(outcome, Only | Off):
            outcome = outcome.otherwise
        return None if isinstance(outcome, Ignore | Refuse) and find(self.schema, key) else action

    def _rules_below(self, key: Key) -> Iterator[str]:
        start = ".".join(_without_places(key)) + "."
        return (name[len(start) :] for name in self.dialect.table if name.startswith(start))

    def _is_known(self, key: Key) -> bool:
        """Whether the schema has this key, or a setting around it whose inside is the user's."""
        key = self._as_schema(key)
        ends = (find(self.schema, key[:end]) for end in range(1, len(key)))
        inside = any(found and not sections(found[0].info.annotation) for found in ends)
        return inside or bool(find(self.schema, key))

    def _is_section(self, key: Key) -> bool:
        found = find(self.schema, self._as_schema(key))
        return any(sections(setting.info.annotation) for setting in found)

    def _as_schema(self, key: Key) -> Key:
        like = self.dialect.like.get(key[0])
        return key if like is None or find(self.schema, key[:1]) else (*like.split("."), *key[1:])

    def _refusal(self, key: Key, value: Any, action: Refuse) -> str:
        if isinstance(value, dict) and value.get("enabled"):  # the switch is what asks for it
            key, value = (*key, "enabled"), value["enabled"]
        shown = "" if isinstance(value, dict | list) else f" = {value}"
        return f"{'.'.join(key)}{shown} ({self.tree.where(key)}) cannot be translated: {action.instead}"

    def _unknown(self, key: Key) -> str:
        *parent, last = key
        siblings = {name.split(".")[0] for name in self._rules_below(tuple(parent))} if parent else set(DIALECTS)
        siblings |= set(fields_at(self.schema, self._as_schema(tuple(parent)) if parent else ()))
        close = difflib.get_close_matches(last, sorted(siblings), n=1)
        proposal = ".".join((*parent, close[0])) if close else nearest(self.schema, key)
        hint = f"did you mean {proposal}?" if proposal else f"known here are {', '.join(sorted(siblings))}"
        return f"unknown key {'.'.join(key)} ({self.tree.where(key)}): {hint}"


def _without_places(key: Key) -> Key:
    """What stands in a list has the rules of what would stand there alone."""
    return tuple(part for part in key if not part.isdigit())
