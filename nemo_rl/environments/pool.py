"""Worker processes for code that may hang, crash or eat memory: a deadline per item, enforced from outside.

One worker serves one item at a time; a worker that misses the deadline is killed and replaced, and no other item
notices.
"""

import asyncio
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe

from nemo_rl.environments.nursery import Reply
from nemo_rl.errors import WorkerError

_START_SECONDS = 120.0
_STOP_SECONDS = 2.0
_CLOSED = "the worker pool is closed; make a new environment to go on"
_BOOT = "import sys; sys.path[:] = {path!r}; from nemo_rl.environments import nursery; nursery.run({arguments})"


class ProcessPool[Result]:
    """Calls a function in worker processes.

    The workers start in the background when the pool is made, and end with `close` or with the process that made them.
    The pool belongs to no event loop: several loops, one after the other, may use it.
    """

    def __init__(
        self,
        function: str,
        *,
        num_workers: int,
        deadline_seconds: float,
        warm_up: tuple[object, ...] | None = None,
        memory_bytes: int = 1 << 30,
    ) -> None:
        """Start the workers.

        Args:
            function: `module:function`, imported in the workers only; its arguments and result pickle.
            num_workers: processes, hence items at a time.
            deadline_seconds: wall time one item may take, waiting for a free worker not counted.
            warm_up: arguments (literals) of one call before any worker starts, so that none pays for first-time work.
            memory_bytes: address space of a worker on Linux; beyond it, its allocations fail. A worker that ever held
                half of it is replaced after its item.
        """
        self._deadline_seconds = deadline_seconds
        self._nursery = _Nursery(f"{function!r}, {warm_up!r}, {memory_bytes}")
        self._closed = False
        self._workers = [self._nursery.worker() for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(num_workers):
            self._idle.put(index)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="process-pool")

    async def run(self, *arguments: object) -> Result:
        """Call the function in the next free worker.

        Raises:
            TimeoutError: it missed the deadline; its worker was killed.
            ChildProcessError: it raised, or its process died; the message says which.
            WorkerError: the worker could not start, or the pool is closed.
        """
        if self._closed:
            raise WorkerError(_CLOSED)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._call, arguments)

    async def close(self) -> None:
        """Kill every worker; items under way raise `WorkerError`. Closing twice is harmless."""
        self._closed = True
        self._nursery.close()
        self._threads.shutdown(cancel_futures=True)

    def _call(self, arguments: tuple[object, ...]) -> Result:
        index = self._idle.get()
        try:
            while self._workers[index].is_lost():
                self._replace(index)
            reply = self._workers[index].call(arguments, self._deadline_seconds)
            if reply.exhausted:
                self._replace(index)
        except (TimeoutError, ChildProcessError, WorkerError):
            self._replace(index)
            raise
        finally:
            self._idle.put(index)
        if reply.error is not None:
            raise ChildProcessError(reply.error)
        return reply.result

    def _replace(self, index: int) -> None:
        self._workers[index].kill()
        if self._closed:
            raise WorkerError(_CLOSED)
        self._workers[index] = self._nursery.worker()


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self) -> None:
        self._connection, self.far_end = Pipe()
        self._pid: int | None = None

    def is_lost(self) -> bool:
        """Wait until it has started; true if it has ended since. Idle, its pipe can be read only when it has."""
        if self._pid is None:
            self._pid = self._started()
        return self._connection.poll()

    def call(self, arguments: tuple[object, ...], deadline_seconds: float) -> Reply:
        try:
            self._connection.send(arguments)
            arrived = self._connection.poll(deadline_seconds)
            reply = self._connection.recv() if arrived else None
        except (EOFError, OSError) as error:
            raise ChildProcessError("the worker process died") from error
        if reply is None:
            raise TimeoutError(f"no result within {deadline_seconds:g} s")
        return reply

    def kill(self) -> None:
        """End the process if it hangs; one that can still read its pipe ends with it, when this object goes."""
        if self._pid is not None and not self._connection.poll():
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def _started(self) -> int:
        try:
            answer = self._connection.recv() if self._connection.poll(_START_SECONDS) else "it did not answer in time"
        except (EOFError, OSError):
            answer = "the process that starts workers died"
        if isinstance(answer, str):
            raise WorkerError(f"a worker process could not start: {answer}")
        return answer


class _Nursery:
    """The parent's end of the process that forks the workers; started anew if it has died."""

    def __init__(self, arguments: str) -> None:
        self._arguments = arguments
        self._lock = threading.Lock()
        self._process, self._control = self._start()

    def worker(self) -> _Worker:
        """Ask for a worker; returns at once."""
        worker = _Worker()
        with self._lock, worker.far_end as far_end:
            if self._process.poll() is not None:
                self._control.close()
                self._process, self._control = self._start()
            # If it died just now, the worker's pipe ends with this block, and the worker's first call says so.
            with suppress(BrokenPipeError):
                socket.send_fds(self._control, [b"w"], [far_end.fileno()])
        return worker

    def close(self) -> None:
        """End it, and with it every worker; wait until all are gone."""
        with self._lock:
            self._control.close()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:  # still importing the function: there are no workers yet
                self._process.kill()
                self._process.wait()

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        near, far = socket.socketpair()
        with far:
            boot = _BOOT.format(path=sys.path, arguments=f"{far.fileno()}, {self._arguments}")
            # A session of its own keeps the terminal's Ctrl-C from killing workers under a run that is still saving.
            process = subprocess.Popen(
                [sys.executable, "-c", boot],
                pass_fds=[far.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return process, near
