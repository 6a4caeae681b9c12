"""`LocalExecutor`: workers on this machine without Ray, one in the driver's own process, a group in processes.

A worker alone has a thread of its own. The thread keeps calls in order and apart, lets an event loop `await` a training
step while environments go on, gives `async def` methods a place to run while the driver's loop is busy, and keeps the
worker's gradient mode, autocast and CUDA device, which torch holds per thread, to the worker. Ctrl-C is delivered to
the driver, which may wait for the call or leave the worker behind in it. `breakpoint()` works as usual.

The workers of a group meet in collectives, for which each needs a process of its own; see `processes`.
"""

import concurrent.futures
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nemo_rl.distributed.calls import CallFuture, joined, worker_name
from nemo_rl.distributed.host import WorkerHost
from nemo_rl.distributed.processes import ProcessWorker
from nemo_rl.errors import ConfigError, WorkerError
from nemo_rl.interfaces import Resources, WorkerHandle


class LocalWorker:
    """A worker on its own thread of this process; arguments and results are passed as they are, not copied."""

    def __init__(self, name: str) -> None:
        """Open the thread; `construct` builds the worker on it."""
        self.name = name
        self._host = WorkerHost()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._pending: set[concurrent.futures.Future[Any]] = set()
        self._stopped = False

    def construct(self, worker: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Build the worker on its thread and wait until it stands."""
        self._thread.submit(self._host.construct, worker, args, kwargs).result()

    def call(self, method: str, *args: Any, **kwargs: Any) -> CallFuture:
        """Queue a call and return at once."""
        if self._stopped:
            raise WorkerError(f"{self.name} was stopped and cannot run `{method}`")
        future = self._thread.submit(self._host.call, method, args, kwargs)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return CallFuture(future, f"{self.name}.{method}")

    def stop(self, *, wait: bool = True) -> None:
        """Cancel what waits, let the running call end, and let go of the worker; without `wait`, return before that."""
        if self._stopped:
            return
        self._stopped = True
        for future in tuple(self._pending):
            future.cancel()
        self._thread.submit(self._host.close)
        self._thread.shutdown(wait)


class LocalExecutor:
    """Starts workers here. Those that are started alone share this process's memory and its environment variables."""

    def __init__(self) -> None:
        """Start with no worker."""
        self._workers: list[LocalWorker] = []
        self._ranks: list[ProcessWorker] = []
        self._env_before: dict[str, str | None] = {}

    def start(
        self, worker: Callable[..., Any], *args: Any, resources: Resources | None = None, **kwargs: Any
    ) -> WorkerHandle:
        """Construct `worker(*args, **kwargs)` on a thread of its own.

        Raises:
            ConfigError: it asks for an environment variable that another worker of this process has set otherwise.
        """
        return self._start(worker_name(worker), worker, args, kwargs, resources)

    def start_group(
        self, worker: Callable[..., Any], arguments: Sequence[Mapping[str, Any]], resources: Resources | None = None
    ) -> list[WorkerHandle]:
        """Construct one worker per rank, all at the same time, each in a process of its own; they share the cores.

        Raises:
            WorkerError: one of them died.
        """
        import torch  # here, because a worker alone may do without it

        name, env_vars = worker_name(worker), (resources or Resources()).env_vars
        num_threads = max(1, torch.get_num_threads() // len(arguments))
        group: list[ProcessWorker] = []
        try:
            for rank in range(len(arguments)):
                group.append(ProcessWorker(f"{name}[{rank}]", env_vars, num_threads))
            built = [place.construct(worker, (), kwargs) for place, kwargs in zip(group, arguments, strict=True)]
            joined(built, list, name).result()
        except BaseException:
            for place in group:
                place.stop()
            raise
        self._ranks.extend(group)
        return [*group]

    def _start(
        self,
        name: str,
        worker: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        resources: Resources | None,
    ) -> LocalWorker:
        self._set_env((resources or Resources()).env_vars, name)
        handle = LocalWorker(name)
        try:
            handle.construct(worker, args, kwargs)
        except BaseException as error:
            handle.stop(wait=not isinstance(error, KeyboardInterrupt))
            raise
        self._workers.append(handle)
        return handle

    def _set_env(self, env_vars: Mapping[str, str], name: str) -> None:
        for key, value in env_vars.items():
            if key in self._env_before and os.environ.get(key) != value:
                raise ConfigError(
                    f"{name} asks for {key}={value}, another worker of this process for {key}={os.environ.get(key)}: "
                    "give both the same value or use `cluster.executor=ray`"
                )
            self._env_before.setdefault(key, os.environ.get(key))
            os.environ[key] = value

    def host_address(self) -> str:
        """Everything is on this machine."""
        return "127.0.0.1"

    def shutdown(self, *, wait: bool = True) -> None:
        """Stop every worker, newest first, and put the environment variables back."""
        while self._ranks:
            self._ranks.pop().stop()
        while self._workers:
            self._workers.pop().stop(wait=wait)
        while self._env_before:
            key, value = self._env_before.popitem()
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value

    def __enter__(self) -> "LocalExecutor":
        """Return itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Shut down; after Ctrl-C without waiting for the calls that are running."""
        self.shutdown(wait=KeyboardInterrupt not in exc)
