"""The driver's end of a call: `CallFuture` waits for one worker, `gather` for many."""

import asyncio
import concurrent.futures
import inspect
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from nemo_rl.errors import WorkerError
from nemo_rl.interfaces import Future


class CallFuture:
    """The result of one call, for threads (`result`) and for event loops (`await`)."""

    __slots__ = ("_future", "_label")

    def __init__(self, future: concurrent.futures.Future[Any], label: str) -> None:
        """Wrap the future that ends with the call.

        Args:
            future: ends with the value or the exception of the call; cancelled when the worker is stopped first.
            label: worker and method, for error messages.
        """
        self._future = future
        self._label = label

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the value.

        Args:
            timeout: seconds to wait; None waits as long as it takes.

        Raises:
            TimeoutError: not there in time; the call goes on.
            WorkerError: the worker was stopped before it could answer, died, or raised in another process.
            NemoRLError: what the worker raised.
        """
        try:
            return self._future.result(timeout)
        except concurrent.futures.CancelledError:
            raise WorkerError(f"{self._label} was stopped before it could answer") from None
        except concurrent.futures.TimeoutError as error:
            if self._future.done():  # the worker itself raised a TimeoutError
                raise
            raise TimeoutError(f"{self._label} did not answer within {timeout:g} s") from error

    def when_done(self, callback: Callable[[], object]) -> None:
        """Call back once the call has ended, from another thread or at once."""
        self._future.add_done_callback(lambda _: callback())

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the value without blocking the running event loop; a cancelled wait leaves the call running."""
        return self._wait().__await__()

    async def _wait(self) -> Any:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop that waited may be closed by now
                loop.call_soon_threadsafe(ended.set)

        self.when_done(wake)
        await ended.wait()
        return self.result()


def gather(futures: Sequence[Future], timeout: float | None = None) -> list[Any]:
    """Wait for all of them; the failure that comes first in time is raised at once, its rank noted on it.

    The order of time matters: when one rank dies, its peers may wait in a collective for ever.

    Args:
        futures: one per rank.
        timeout: seconds for all of them together.

    Returns:
        The values in rank order.

    Raises:
        TimeoutError: not all of them were there in time.
    """
    ended: SimpleQueue[int] = SimpleQueue()
    for rank, future in enumerate(futures):
        future.when_done(lambda rank=rank: ended.put(rank))
    deadline = None if timeout is None else time.monotonic() + timeout
    values: list[Any] = [None] * len(futures)
    for count in range(len(futures)):
        try:
            rank = ended.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except Empty:
            raise TimeoutError(f"{len(futures) - count} of {len(futures)} calls did not end in time") from None
        try:
            values[rank] = futures[rank].result()
        except Exception as error:
            error.add_note(f"rank {rank} of {len(futures)}")
            raise
    return values


def worker_name(worker: Callable[..., Any]) -> str:
    """Name a worker class or factory for people."""
    return worker.__name__ if inspect.isroutine(worker) or inspect.isclass(worker) else type(worker).__name__
