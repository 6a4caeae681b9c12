"""`ProcessWorker`: a worker in a process of its own on this machine, without Ray.

The process is forked from multiprocessing's fork server, which has imported what models need, so that starting one
takes a fraction of a second and no thread of the driver is forked. It leads a process group: Ctrl-C in a terminal does
not reach it, and whatever it has started ends with it. It ends when the driver stops it, and when the driver dies,
because then its pipe ends.
"""

import atexit
import concurrent.futures
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any

from nemo_rl.distributed.calls import CallFuture
from nemo_rl.distributed.host import ActorHost
from nemo_rl.errors import NemoRLError, WorkerDiedError, WorkerError

_PRELOADED = ["torch.distributed.fsdp", "nemo_rl.workers.policy"]
"""Imported once, in the fork server: what a model's rank would import; without it a rank takes seconds to start."""


class ProcessWorker:
    """A worker in a child process; arguments and results are pickled."""

    def __init__(self, name: str, env_vars: Mapping[str, str], num_threads: int) -> None:
        """Start the process; `construct` builds the worker in it.

        Args:
            name: of the worker, for messages.
            env_vars: set in the process, on top of the driver's.
            num_threads: of its arithmetic.
        """
        self.name = name
        self._lock = threading.Lock()
        self._pending: deque[tuple[concurrent.futures.Future[Any], str]] = deque()
        self._stopped = False
        self._death: str | None = None
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._pipe, theirs = context.Pipe()
        environ = {**os.environ, "OMP_NUM_THREADS": str(num_threads), **env_vars}
        import_path = [os.path.abspath(folder) for folder in sys.path]
        # no daemon, because such a process must not have children of its own
        self._process = context.Process(
            target=_serve, args=(theirs, name, import_path, environ, num_threads), name=name, daemon=False
        )
        self._process.start()
        theirs.close()
        self._reader = threading.Thread(target=self._read, name=f"{name} answers", daemon=True)
        self._reader.start()
        atexit.register(self.stop)  # else the interpreter would wait for a worker that nobody has stopped

    def construct(self, worker: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> CallFuture:
        """Begin to build the worker in its process."""
        return self._send("start", (None, (worker, args, kwargs), {}))

    def call(self, method: str, *args: Any, **kwargs: Any) -> CallFuture:
        """Queue a call and return at once; once the process has died, the answer is that it has."""
        if self._stopped:
            raise WorkerError(f"{self.name} was stopped and cannot run `{method}`")
        return self._send(method, (method, args, kwargs))

    def stop(self) -> None:
        """Kill the process and what it has started, whatever they do; calls that wait for it fail at once."""
        if self._stopped:
            return
        self._stopped = True
        atexit.unregister(self.stop)
        with self._lock:
            waiting = [future for future, _ in self._pending]
        for future in waiting:
            future.cancel()
        if self._reader.is_alive():  # else the process has died long ago, and its number may be another's
            self._kill()
        self._reader.join()
        self._pipe.close()

    def _send(self, what: str, request: object) -> CallFuture:
        answer: concurrent.futures.Future[Any] = concurrent.futures.Future()
        data = pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL)
        with self._lock:
            if self._death is None:
                self._pending.append((answer, what))
                with suppress(OSError):  # it has just died: the reader says so
                    self._pipe.send_bytes(data)
            else:
                answer.set_exception(
                    WorkerDiedError(f"worker {self.name} has died ({self._death}) and runs no `{what}`")
                )
        return CallFuture(answer, f"{self.name}.{what}")

    def _read(self) -> None:
        """Hand on every answer to the call that it belongs to; calls are answered in their order."""
        while (data := self._next_answer()) is not None:
            with self._lock:
                answer, what = self._pending.popleft()
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                result, error = pickle.loads(data)
            except Exception as failure:
                result, error = None, WorkerError(f"the answer of worker {self.name} to `{what}` is damaged: {failure}")
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(error)
        self._bury()

    def _next_answer(self) -> bytes | None:
        """The next message of the process, or None once there will be no more."""
        ready = wait([self._pipe, self._process.sentinel])  # a child of it may hold its end of the pipe open
        if self._pipe not in ready:
            return None
        with suppress(EOFError, OSError):
            return self._pipe.recv_bytes()
        return None

    def _bury(self) -> None:
        """Fail the calls that wait for a process that has died, and end what it has left behind."""
        self._kill()  # it may live without its pipe
        self._process.join()
        with self._lock:
            self._death = _cause(self._process.exitcode)
            lost, self._pending = self._pending, deque()
        for answer, what in lost:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(WorkerDiedError(f"worker {self.name} died during `{what}`: {self._death}"))

    def _kill(self) -> None:
        pid = self._process.pid
        assert pid is not None
        for kill in (os.killpg, os.kill):  # of its group it is the leader, if it has come so far
            with suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)


def _cause(exit_code: int | None) -> str:
    """Why a process has ended, for people."""
    if exit_code is None or exit_code >= 0:
        return f"its process ended with exit code {exit_code}"
    killer = signal.Signals(-exit_code).name
    hint = ", as the system does when memory runs out" if killer == "SIGKILL" else ""
    return f"its process was ended by {killer}{hint}"


def _serve(
    pipe: Connection, name: str, import_path: Sequence[str], environ: Mapping[str, str], num_threads: int
) -> None:
    """Be the process of a worker: run one call after the other, and end with the driver."""
    os.setpgid(0, 0)
    os.environ.clear()  # the fork server's is as old as itself
    os.environ.update(environ)
    import torch  # the fork server has it already

    torch.set_num_threads(num_threads)
    host = ActorHost(name, import_path)
    requests: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, requests), daemon=True).start()
    while True:
        pipe.send_bytes(_answer(host, name, requests.get()))


def _receive(pipe: Connection, requests: SimpleQueue[bytes]) -> None:
    """Keep the pipe empty, so that the driver need not wait; when it ends, so does everything here."""
    with suppress(EOFError, OSError):
        while True:
            requests.put(pipe.recv_bytes())
    os.killpg(0, signal.SIGKILL)


def _answer(host: ActorHost, name: str, request: bytes) -> bytes:
    """Run a call: its result and its error, of which one is None, ready to travel."""
    try:
        method, args, kwargs = pickle.loads(request)
        result = host.construct(*args) if method is None else host.call(method, args, kwargs)
        return pickle.dumps((result, None), protocol=pickle.HIGHEST_PROTOCOL)
    except NemoRLError as error:
        return pickle.dumps((None, error))
    except Exception:
        trace = traceback.format_exc()
        return pickle.dumps((None, WorkerError(f"worker {name} cannot read a call or send its result:\n{trace}")))
