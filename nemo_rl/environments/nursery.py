"""What runs on the far side of a `ProcessPool`: a nursery that imports a function once and forks workers that call it.

A fork takes milliseconds where a fresh interpreter would take seconds to import its way to the function, so killing a
hung worker is cheap. Nothing here imports torch, and nothing of the parent's `__main__` is imported.
"""

import importlib
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any


@dataclass(frozen=True, slots=True)
class Reply:
    """A worker's answer: a result or an error, and whether its memory has grown so much that it should be replaced."""

    result: Any
    error: str | None
    exhausted: bool


def run(control_fd: int, function: str, warm_up: tuple[object, ...] | None, memory_bytes: int) -> None:
    """Be the nursery: fork one worker for every pipe that arrives on the control socket, until the socket ends.

    A worker first sends its process id; if the function cannot be imported, every pipe gets that sentence instead.
    When the socket ends (the pool was closed, or its process died), every worker is killed.
    """
    logging.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    workers: set[int] = set()
    with socket.socket(fileno=control_fd) as control:
        call = _import(function)
        if warm_up is not None and not isinstance(call, str):
            call(*warm_up)
        while fds := socket.recv_fds(control, 1, 1)[1]:
            _reap(workers)
            with Connection(fds[0]) as connection:
                if isinstance(call, str):
                    connection.send(call)
                elif pid := os.fork():
                    workers.add(pid)
                else:
                    control.close()
                    _work(connection, call, memory_bytes)
    # A process id stays taken until its process is reaped, so these are still ours.
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    for pid in workers:
        os.waitpid(pid, 0)


def _import(function: str) -> Callable[..., object] | str:
    module, _, name = function.partition(":")
    try:
        return vars(importlib.import_module(module))[name]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _reap(workers: set[int]) -> None:
    for pid in tuple(workers):
        if os.waitpid(pid, os.WNOHANG)[0]:
            workers.remove(pid)


def _work(connection: Connection, call: Callable[..., object], memory_bytes: int) -> None:
    """Be a worker: answer every tuple of arguments with a `Reply`; never return."""
    try:
        if sys.platform == "linux":  # macOS refuses this limit
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        connection.send(os.getpid())
        while True:
            connection.send(_reply(call, connection.recv(), memory_bytes))
    finally:
        os._exit(1)


def _reply(call: Callable[..., object], arguments: tuple[object, ...], memory_bytes: int) -> Reply:
    result, error = None, None
    try:
        result = call(*arguments)
    except Exception as raised:
        error = f"{type(raised).__name__}: {str(raised)[:500]}"
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Reply(result, error, exhausted=peak_bytes > memory_bytes // 2)
