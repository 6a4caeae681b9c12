"""What can become of a key of NeMo RL's YAML."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Keep:
    """The key means the same here."""


@dataclass(frozen=True, slots=True)
class Rename:
    """The value stands under the key `new` here."""

    new: str


@dataclass(frozen=True, slots=True)
class Set:
    """These keys say the same here; `note` tells what differs."""

    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Add:
    """These keys belong to the section as well; its own keys are looked at one by one."""

    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ignore:
    """The key has no counterpart (while the schema has none) and the run does not need it; the reason is told."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """The run would be another one without the key (while the schema has none); `instead` says what to write."""

    instead: str


@dataclass(frozen=True, slots=True)
class Only:
    """With one of these values the key asks for nothing, so nothing is said; `otherwise` holds for any other."""

    values: tuple[Any, ...]
    otherwise: "Action"


@dataclass(frozen=True, slots=True)
class Off:
    """A section with a switch `enabled`: nothing is said while it is off; `otherwise` holds when it is on.

    None looks at the keys of the section one by one.
    """

    otherwise: "Action | None" = None


@dataclass(frozen=True, slots=True)
class Convert:
    """`function(value, config)` decides, with the whole configuration in view; None is as if there were no rule."""

    function: "Callable[[Any, Config], Action | None]"


type Action = Keep | Rename | Set | Add | Ignore | Refuse | Only | Off | Convert
type Table = Mapping[str, Action]
"""Actions by dotted key; a part `*` stands for any name."""

NOTHING = Set()
"""The key needs no counterpart, and there is nothing to tell."""


@dataclass(frozen=True, slots=True)
class Config:
    """A NeMo RL configuration with its interpolations resolved."""

    values: Mapping[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        """The value at a dotted key."""
        value: Any = self.values
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value
