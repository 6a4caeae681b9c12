"""Choose where the workers live."""

from typing import Literal

from nemo_rl.distributed.local import LocalExecutor
from nemo_rl.distributed.ray_executor import RayExecutor
from nemo_rl.interfaces import Executor


def make_executor(
    kind: Literal["local", "ray"],
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    startup_timeout_seconds: float = 300.0,
) -> Executor:
    """Make the executor that `cluster.executor` names; use it as a context manager.

    Args:
        kind: `local` keeps workers that are started alone in this process, `ray` makes each an actor.
        num_cpus: CPUs of a Ray cluster started here; None counts the machine's.
        num_gpus: GPUs of a Ray cluster started here; None counts the machine's.
        startup_timeout_seconds: how long Ray may take to reserve and build one group of workers.

    Raises:
        DependencyError: `ray` is asked for and not installed.
        WorkerError: no Ray cluster answers.
    """
    if kind == "local":
        return LocalExecutor()
    return RayExecutor(num_cpus=num_cpus, num_gpus=num_gpus, startup_timeout_seconds=startup_timeout_seconds)
