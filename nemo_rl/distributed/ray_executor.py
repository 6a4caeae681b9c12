"""`RayExecutor`: one Ray actor per worker, each in a process of its own.

The worker stays a plain class that knows nothing of Ray: the actor is an `ActorHost` around it.
"""

import concurrent.futures
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from nemo_rl.distributed.calls import CallFuture, joined, worker_name
from nemo_rl.distributed.cluster import RayCluster, Reservation
from nemo_rl.distributed.host import ActorHost
from nemo_rl.errors import NemoRLError, WorkerDiedError, WorkerError
from nemo_rl.interfaces import Resources, WorkerHandle

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle


class RayWorker:
    """A worker in an actor; arguments and results are pickled."""

    def __init__(self, actor: "ActorHandle[ActorHost]", name: str, reservation: Reservation) -> None:
        """Take an actor that is starting."""
        self.name = name
        self._actor = actor
        self._reservation = reservation
        self._pending: set[concurrent.futures.Future[Any]] = set()
        self._stopped = False

    def construct(self, worker: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> CallFuture:
        """Begin to build the worker in its actor."""
        return self._follow(self._actor.construct.remote(worker, args, kwargs), "start")

    def call(self, method: str, *args: Any, **kwargs: Any) -> CallFuture:
        """Queue a call and return at once."""
        if self._stopped:
            raise WorkerError(f"{self.name} was stopped and cannot run `{method}`")
        return self._follow(self._actor.call.remote(method, args, kwargs), method)

    def stop(self) -> None:
        """Kill the actor, whatever it is doing; calls that wait for it fail at once."""
        if self._stopped:
            return
        self._stopped = True
        import ray

        for future in tuple(self._pending):
            future.cancel()
        ray.kill(self._actor, no_restart=True)
        self._reservation.leave()

    def _follow(self, ref: "ObjectRef[Any]", method: str) -> CallFuture:
        """Forward Ray's answer to a future of our own, which ends even when Ray is gone, in our own errors."""
        answer: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def forward(source: concurrent.futures.Future[Any]) -> None:
            error = source.exception()
            if not answer.set_running_or_notify_cancel():
                return
            if error is None:
                answer.set_result(source.result())
            else:
                answer.set_exception(_own_error(error, self.name, method))

        self._pending.add(answer)
        answer.add_done_callback(self._pending.discard)
        ref.future().add_done_callback(forward)
        return CallFuture(answer, f"{self.name}.{method}")


class RayExecutor:
    """Starts workers as Ray actors, on the cluster of `RAY_ADDRESS` or on one of its own that ends with it."""

    def __init__(
        self, *, num_cpus: int | None = None, num_gpus: int | None = None, startup_timeout_seconds: float = 300.0
    ) -> None:
        """Connect to Ray.

        Args:
            num_cpus: CPUs of an own cluster; None counts the machine's.
            num_gpus: GPUs of an own cluster; None counts the machine's.
            startup_timeout_seconds: for one `start` or `start_group`: places reserved and workers built.

        Raises:
            DependencyError: Ray is not installed.
            WorkerError: no cluster answers, or none can be started.
        """
        self._cluster = RayCluster(num_cpus=num_cpus, num_gpus=num_gpus)
        self._timeout = startup_timeout_seconds
        self._workers: list[RayWorker] = []

    def start(
        self, worker: Callable[..., Any], *args: Any, resources: Resources | None = None, **kwargs: Any
    ) -> WorkerHandle:
        """Construct `worker(*args, **kwargs)` in an actor and wait until it stands.

        Raises:
            ConfigError: the cluster has no place for it.
            WorkerError: it failed, died or did not stand in time.
        """
        return self._start(worker, [worker_name(worker)], [(args, kwargs)], resources or Resources())[0]

    def start_group(
        self, worker: Callable[..., Any], arguments: Sequence[Mapping[str, Any]], resources: Resources | None = None
    ) -> list[WorkerHandle]:
        """Construct one worker per rank, all at the same time, on places that are reserved as a whole."""
        names = [f"{worker_name(worker)}[{rank}]" for rank in range(len(arguments))]
        return [*self._start(worker, names, [((), kwargs) for kwargs in arguments], resources or Resources())]

    def _start(
        self,
        worker: Callable[..., Any],
        names: Sequence[str],
        arguments: Sequence[tuple[Sequence[Any], Mapping[str, Any]]],
        resources: Resources,
    ) -> list[RayWorker]:
        deadline = time.monotonic() + self._timeout
        reservation = self._cluster.reserve([resources] * len(names), worker_name(worker), self._timeout)
        group = [_place(name, resources, reservation, index) for index, name in enumerate(names)]
        try:
            built = [
                place.construct(worker, args, kwargs) for place, (args, kwargs) in zip(group, arguments, strict=True)
            ]
            joined(built, list, worker_name(worker)).result(max(0.0, deadline - time.monotonic()))
        except BaseException as error:
            for place in group:
                place.stop()
            if isinstance(error, TimeoutError):
                raise WorkerError(
                    f"{worker_name(worker)} did not start: {error} (cluster.startup_timeout_seconds={self._timeout:g})"
                ) from None
            raise
        self._workers.extend(group)
        return group

    def host_address(self) -> str:
        """The address of this machine in the cluster's network."""
        return self._cluster.host_address()

    def shutdown(self) -> None:
        """Kill every worker, give their places back and end the cluster if it is an own one."""
        try:
            while self._workers:
                self._workers.pop().stop()
        finally:
            self._cluster.close()

    def __enter__(self) -> "RayExecutor":
        """Return itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Shut down."""
        self.shutdown()


def _place(name: str, resources: Resources, reservation: Reservation, index: int) -> RayWorker:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    actor = (
        ray.remote(ActorHost)
        .options(
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(reservation.group, index),
            runtime_env={"env_vars": dict(resources.env_vars)} if resources.env_vars else None,
        )
        .remote(name, [os.path.abspath(folder) for folder in sys.path])
    )
    return RayWorker(cast("ActorHandle[ActorHost]", actor), name, reservation)


def _own_error(error: BaseException, name: str, method: str) -> Exception:
    from ray.exceptions import RayActorError, RayTaskError

    if isinstance(error, RayTaskError) and isinstance(error.cause, NemoRLError):
        return error.cause
    if isinstance(error, RayActorError):
        return WorkerDiedError(f"worker {name} died during `{method}`: {error}")
    return WorkerError(f"worker {name} failed in `{method}`: {error}")
