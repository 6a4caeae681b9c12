"""The driver's end of a call: `CallFuture` waits for one worker, `joined` for many."""

import asyncio
import concurrent.futures
import inspect
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from nemo_rl.errors import WorkerError
from nemo_rl.interfaces import Future

_DEATH_IS_KNOWN_SECONDS = 0.5
"""How long the driver may take to notice that a process has ended."""


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


def joined(futures: Sequence[Future], combine: Callable[[list[Any]], Any], label: str) -> CallFuture:
    """Make one future of many; it fails with the first failure in time, its rank noted on it.

    The order of time matters: when one rank dies, its peers may wait in a collective for ever. Or they fail, because
    they miss it, at the same moment; then its death is what is told.

    Args:
        futures: one per rank.
        combine: makes the value of all values, in rank order; called in the thread that brought the last one.
        label: who was called for what, for error messages.
    """
    answer: concurrent.futures.Future[Any] = concurrent.futures.Future()
    values: list[Any] = [None] * len(futures)
    lock, left = threading.Lock(), set(range(len(futures)))

    def end() -> None:
        try:
            answer.set_result(combine(values))
        except BaseException as error:
            answer.set_exception(error)

    def fail(error: BaseException) -> None:
        with lock:
            if not answer.done():
                answer.set_exception(error)

    def collect(rank: int) -> None:
        try:
            values[rank] = futures[rank].result(0)
        except BaseException as error:
            error.add_note(f"rank {rank} of {len(futures)}")
            if type(error) is WorkerError and len(futures) > 1:  # perhaps it only misses one that has just died
                late = threading.Timer(_DEATH_IS_KNOWN_SECONDS, fail, [error])
                late.daemon = True
                late.start()
            else:
                fail(error)
            return
        with lock:
            left.discard(rank)
            is_last = not left and not answer.done()
        if is_last:
            end()

    if not futures:
        end()
    for rank, future in enumerate(futures):
        future.when_done(partial(collect, rank))
    return CallFuture(answer, label)


def worker_name(worker: Callable[..., Any]) -> str:
    """Name a worker class or factory for people."""
    return worker.__name__ if inspect.isroutine(worker) or inspect.isclass(worker) else type(worker).__name__
