"""The simplest environment: a plain Python function, named by import path, gives the reward."""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any
from weakref import WeakKeyDictionary

from nemo_rl.data.types import Message, Outcome
from nemo_rl.environments.base import last_reply, named_rewards
from nemo_rl.errors import ConfigError, EnvironmentFailure
from nemo_rl.import_path import load_callable

_MAX_CALLS = 32
_VALUE_KINDS = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

type _Answer = tuple[object, BaseException | None]
"""What a call returned and what it raised. As data: StopIteration cannot be raised into a future, and SystemExit,
KeyboardInterrupt and CancelledError would be taken for somebody else's."""


class FunctionEnvironment:
    """Calls `reward(completion: str, **extra) -> float | dict[str, float]`, sync or async.

    The function gets those entries of the task's `extra` that its parameters name (all of them if it takes `**kwargs`),
    save one that has the name of its first parameter, which is the completion.
    A sync function runs in a thread, so a slow one blocks nobody; at most 32 calls run at a time.
    """

    def __init__(self, path: str, *, timeout_seconds: float | None = None) -> None:
        """Import the function.

        Args:
            path: `package.module:function` or `path/to/file.py:function`.
            timeout_seconds: wall time of one call; None: no limit. A sync call that exceeds it is left behind in its
                thread, as Python cannot end it.

        Raises:
            ConfigError: there is no such function, importing it raises, or it cannot take a completion.
        """
        self._name = path
        self._function = load_callable(path, "reward function")
        self._takes = _accepted_extras(self._function, path)
        self._timeout_seconds = timeout_seconds
        # A semaphore belongs to one event loop; a run may use several, one after the other.
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    async def step(self, messages: Sequence[Message], extra: Mapping[str, Any], state: Any = None) -> Outcome:
        """Judge the last message; the conversation ends.

        Raises:
            EnvironmentFailure: it raised, took too long, or returned no finite number; names function and task.
        """
        reply = last_reply(messages)
        known = {key: value for key, value in extra.items() if self._takes(key)}
        source = f"reward function {self._name} (task {_excerpt(messages)})"
        slots = self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(_MAX_CALLS))
        async with slots:
            value = await self._call(reply, known, source)
        return Outcome(rewards=named_rewards(value, source=source))

    async def close(self) -> None:
        """Nothing is held."""

    async def _call(self, reply: str, extra: Mapping[str, Any], source: str) -> object:
        clock = asyncio.timeout(self._timeout_seconds)
        try:
            async with clock:
                value, error = await _in_thread(lambda: self._function(reply, **extra))
                if inspect.isawaitable(value):
                    value, error = await _awaited(value)
        except TimeoutError as too_late:
            value, error = None, too_late
        if error is None:
            return value
        if clock.expired():
            raise EnvironmentFailure(f"{source} did not return within {self._timeout_seconds:g} s") from error
        raise EnvironmentFailure(f"{source} raised {type(error).__name__}: {error}") from error


def _in_thread(call: Callable[[], object]) -> Awaitable[_Answer]:
    """Run it in a daemon thread, which neither a full thread pool nor the end of the program has to wait for."""
    future: Future[_Answer] = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            answer: _Answer = call(), None
        except BaseException as error:
            answer = None, error
        future.set_result(answer)

    threading.Thread(target=work, name="reward-function", daemon=True).start()
    return asyncio.wrap_future(future)


async def _awaited(value: Awaitable[object]) -> _Answer:
    """What an async function came to; Ctrl-C and a cancellation from outside are not its own and pass through."""
    try:
        return await value, None
    except (Exception, SystemExit) as error:
        return None, error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        return None, error


def _accepted_extras(function: Callable[..., Any], path: str) -> Callable[[str], bool]:
    """Whether it takes an extra of a name.

    Raises:
        ConfigError: its first parameter cannot take the completion, or a later one cannot be given by name.
    """
    parameters = list(inspect.signature(function).parameters.values())
    takes_completion = bool(parameters) and parameters[0].kind in (*_VALUE_KINDS, inspect.Parameter.VAR_POSITIONAL)
    nameless = [p for p in parameters[1:] if p.kind is inspect.Parameter.POSITIONAL_ONLY and p.default is p.empty]
    if not takes_completion or nameless:
        signature = f"{path.rpartition(':')[2]}{inspect.signature(function)}"
        raise ConfigError(f"reward function {path!r} is {signature}; it must be callable as (completion, **extra)")
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    completion, *others = [parameter.name if parameter.kind in named else None for parameter in parameters]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return lambda name: name != completion
    return lambda name: name in others


def _excerpt(messages: Sequence[Message]) -> str:
    text = next((message["content"] for message in messages if message["role"] == "user"), "")
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
