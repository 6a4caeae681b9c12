"""The worker's end of a call: hosts that run it where the worker lives.

Every executor uses the same host, so a worker meets the same rules everywhere: one call at a time, in call order, with
`async def` methods run to their end on one event loop that lives as long as the worker. This module imports nothing
heavy: an actor whose worker does without torch starts in a second and stays small.
"""

import asyncio
import inspect
import sys
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from nemo_rl.errors import NemoRLError, WorkerError


class WorkerHost:
    """Holds one worker and calls its methods; used by one thread only."""

    def __init__(self) -> None:
        """Prepare an empty host; `construct` fills it."""
        self._worker: Any = None
        self._loop = asyncio.Runner()

    def construct(self, worker: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Build the worker here."""
        self._worker = worker(*args, **kwargs)

    def call(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run one method to its end and return what it returns."""
        result = getattr(self._worker, method)(*args, **kwargs)
        return self._loop.run(result) if inspect.iscoroutine(result) else result

    def close(self) -> None:
        """Let go of the worker and of its event loop."""
        self._worker = None
        self._loop.close()


class ActorHost:
    """What runs in the actor: a `WorkerHost` whose exceptions can travel."""

    def __init__(self, name: str, import_path: Sequence[str]) -> None:
        """Open an empty place.

        Args:
            name: of the worker, for messages.
            import_path: the driver's `sys.path`, so that whatever it could import unpickles here too.
        """
        sys.path.extend(folder for folder in import_path if folder not in sys.path)
        self._name = name
        self._host = WorkerHost()

    def __repr__(self) -> str:
        """Name the worker; Ray puts this before every line that it prints."""
        return self._name

    def construct(self, worker: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Build the worker here."""
        with self._portable("start"):
            self._host.construct(worker, args, kwargs)

    def call(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run one method to its end."""
        with self._portable(f"`{method}`"):
            return self._host.call(method, args, kwargs)

    @contextmanager
    def _portable(self, what: str) -> Generator[None]:
        """Let our own errors pass, with the traceback as a note; turn others, which may not unpickle, into text."""
        try:
            yield
        except NemoRLError as error:
            error.add_note(f"raised in worker {self._name}:\n{traceback.format_exc()}")
            raise
        except Exception:
            raise WorkerError(f"worker {self._name} failed in {what}:\n{traceback.format_exc()}") from None
