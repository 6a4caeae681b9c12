"""The Ray cluster under the workers: connect to it, reserve places on it, leave nothing behind."""

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nemo_rl.errors import ConfigError, DependencyError, WorkerError
from nemo_rl.interfaces import Resources

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

type Bundle = dict[str, float]
"""Ray's name for what one worker takes: `{"CPU": 1.0, "GPU": 1.0}`."""

LOGGER = logging.getLogger(__name__)
QUIET_SECONDS = 10.0
RAY_ENV = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would build an environment anew for every worker
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Reservation:
    """A placement group with one bundle per worker; given back when its last worker has left."""

    def __init__(self, group: "PlacementGroup", num_workers: int) -> None:
        """Take a placement group that is ready."""
        self.group = group
        self._left = num_workers

    def leave(self) -> None:
        """Count one worker out."""
        self._left -= 1
        if self._left == 0:
            self.release()

    def release(self) -> None:
        """Give every bundle back, now; whatever still runs in one of them is killed."""
        from ray.util.placement_group import remove_placement_group

        self._left = 0
        remove_placement_group(self.group)


class RayCluster:
    """This process's connection to Ray: the cluster `RAY_ADDRESS` names, or one of its own on this machine."""

    def __init__(self, *, num_cpus: int | None = None, num_gpus: int | None = None) -> None:
        """Connect.

        Args:
            num_cpus: CPUs of an own cluster; None counts the machine's. An existing cluster knows its own.
            num_gpus: the same for GPUs.

        Raises:
            DependencyError: Ray is not installed.
            WorkerError: no cluster answers, or none can be started.
        """
        for key, value in RAY_ENV.items():
            os.environ.setdefault(key, value)  # read by Ray at import and start
        try:
            import ray
            from ray.exceptions import RayError
        except ImportError as error:
            raise DependencyError(
                "`cluster.executor=ray` needs Ray: `uv sync --extra ray` or `pip install 'nemo-rl[ray]'`"
            ) from error
        address = os.environ.get("RAY_ADDRESS")
        self._joined = ray.is_initialized()
        self.is_own = not self._joined and address in (None, "", "local")
        if self._joined:
            return
        try:
            if not self.is_own:
                _knock(address or "")
            ray.init(
                "local" if self.is_own else address,
                num_cpus=num_cpus if self.is_own else None,
                num_gpus=num_gpus if self.is_own else None,
                include_dashboard=False if self.is_own else None,
                logging_level=logging.ERROR,
            )
        except (OSError, RuntimeError, ValueError, RayError) as error:
            what = "a Ray cluster on this machine" if self.is_own else f"the Ray cluster at RAY_ADDRESS={address}"
            raise WorkerError(f"cannot connect to {what}: {error}") from error

    def reserve(self, wanted: Sequence[Resources], name: str, timeout: float) -> Reservation:
        """Reserve a place for every worker, all of them or none.

        Args:
            wanted: one entry per worker.
            name: what the workers are, for messages.
            timeout: seconds to wait for others to give up their places or for nodes to join.

        Raises:
            ConfigError: the cluster is too small, or stayed so until the timeout.
        """
        from ray.util.placement_group import placement_group, remove_placement_group

        bundles = [_bundle(resources) for resources in wanted]
        if self.is_own and not _could_fit(bundles, self._nodes()):
            raise ConfigError(self._refusal(bundles, name))
        group = placement_group(bundles, strategy="PACK")
        if group.wait(min(QUIET_SECONDS, timeout)):
            return Reservation(group, len(bundles))
        if timeout > QUIET_SECONDS:
            LOGGER.warning("%s; waiting up to %g s", self._refusal(bundles, name), timeout)
            if group.wait(timeout - QUIET_SECONDS):
                return Reservation(group, len(bundles))
        remove_placement_group(group)
        raise ConfigError(f"{self._refusal(bundles, name)} (waited {timeout:g} s)")

    def host_address(self) -> str:
        """The address at which the nodes reach this machine."""
        import ray.util

        return "127.0.0.1" if self.is_own else ray.util.get_node_ip_address()

    def close(self) -> None:
        """Disconnect, and end the cluster if it is an own one."""
        import ray

        if not self._joined:
            ray.shutdown()

    def _nodes(self) -> list[Bundle]:
        import ray

        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def _refusal(self, bundles: Sequence[Bundle], name: str) -> str:
        import ray

        nodes = self._nodes()
        return (
            f"{len(bundles)} x {name} asks for {_say(_total(bundles))} ({_say(bundles[0])} each), "
            f"the Ray cluster has {_say(_total(nodes))} on {len(nodes)} node(s), "
            f"{_say(ray.available_resources())} free: lower the request in the `cluster` section, "
            "add nodes, or end what holds them"
        )


def _knock(address: str) -> None:
    """Raise OSError if nothing listens at `[ray://]host:port`: Ray itself would try for minutes without a word."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=QUIET_SECONDS).close()


def _bundle(resources: Resources) -> Bundle:
    """Say it in Ray's words; Ray refuses an empty bundle, so a worker that asks for nothing takes a crumb of a CPU."""
    bundle: Bundle = {"CPU": max(resources.num_cpus, 0.001)}
    return bundle | {"GPU": resources.num_gpus} if resources.num_gpus else bundle


def _total(bundles: Sequence[Mapping[str, float]]) -> Bundle:
    return {kind: sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU")}


def _could_fit(bundles: Sequence[Bundle], nodes: Sequence[Bundle]) -> bool:
    """Tell whether the nodes, empty, have the sum of the bundles and one of them has room for the largest of each."""
    total, room = _total(bundles), _total(nodes)
    return all(
        total[kind] <= room[kind]
        and max(bundle.get(kind, 0.0) for bundle in bundles) <= max(node.get(kind, 0.0) for node in nodes)
        for kind in total
    )


def _say(bundle: Mapping[str, float]) -> str:
    return f"{bundle.get('CPU', 0.0):g} CPU and {bundle.get('GPU', 0.0):g} GPU"
