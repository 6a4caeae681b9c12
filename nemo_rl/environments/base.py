"""What every environment needs: rewards in one form, never a value that is not a finite number."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Protocol, TypeGuard, runtime_checkable

from nemo_rl.data.types import Message
from nemo_rl.errors import EnvironmentFailure


def named_rewards(value: object, *, source: str) -> dict[str, float]:
    """Turn what a reward function returned into `{name: reward}`; a plain number becomes `{"reward": number}`.

    Args:
        value: a number (of NumPy or torch, too), or a non-empty mapping from names to numbers.
        source: who returned it, for the message.

    Raises:
        EnvironmentFailure: it is anything else, or a number is NaN or infinite.

    >>> named_rewards(True, source="f")
    {'reward': 1.0}
    """
    rewards = value if isinstance(value, Mapping) else {"reward": value}
    if not rewards:
        raise EnvironmentFailure(f"{source} returned an empty mapping; return a number or name at least one reward")
    checked: dict[str, float] = {}
    for name, reward in rewards.items():
        if not isinstance(name, str):
            raise EnvironmentFailure(f"{source} named a reward {name!r}; names of rewards are strings")
        number = _plain(reward)
        if not _is_finite_number(number):
            raise EnvironmentFailure(
                f"{source} returned {_shown(number)} as {name!r}; return a finite number or a mapping of them"
            )
        checked[name] = float(number)
    return checked


def last_reply(messages: Sequence[Message]) -> str:
    """The policy's latest turn: the text to judge.

    Raises:
        EnvironmentFailure: the conversation is empty or does not end with an assistant message.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise EnvironmentFailure("there is no reply to judge: the conversation must end with an assistant message")
    return messages[-1]["content"]


@runtime_checkable
class _Scalar(Protocol):
    """What NumPy and torch wrap a number in."""

    def item(self) -> object: ...


def _plain(value: object) -> object:
    """Unwrap the number of a NumPy or torch scalar; anything else, such as an array of several, stays as it is."""
    if isinstance(value, _Scalar):
        with suppress(ValueError, RuntimeError, TypeError):
            return value.item()
    return value


def _is_finite_number(value: object) -> TypeGuard[Real]:
    return isinstance(value, Real) and math.isfinite(value)


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, Real) else f"a value of type {type(value).__name__}"
