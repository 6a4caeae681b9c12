"""`WorkerGroup`: the ranks of one worker class, called together."""

from collections.abc import Sequence
from typing import Any

from nemo_rl.distributed.calls import gather
from nemo_rl.interfaces import WorkerHandle


class WorkerGroup:
    """Calls all ranks at once and gathers what they return, in rank order.

    The first failure in time is raised, with a note that names its rank; the other ranks may still be running then.

    Example:
        >>> group = WorkerGroup(executor.start_group(Worker, [{"rank": 0}, {"rank": 1}]))  # doctest: +SKIP
        >>> group.scatter("logprobs", shards)  # doctest: +SKIP
    """

    def __init__(self, workers: Sequence[WorkerHandle]) -> None:
        """Take the handles; the position of a handle is its rank."""
        self.workers = tuple(workers)

    def __len__(self) -> int:
        """Count the ranks."""
        return len(self.workers)

    def broadcast(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call `method` with the same arguments on every rank."""
        return gather([worker.call(method, *args, **kwargs) for worker in self.workers])

    def scatter(self, method: str, shards: Sequence[Any], **kwargs: Any) -> list[Any]:
        """Call `method(shards[rank], **kwargs)` on every rank.

        Raises:
            ValueError: the number of shards is not the number of ranks.
        """
        pairs = zip(self.workers, shards, strict=True)
        return gather([worker.call(method, shard, **kwargs) for worker, shard in pairs])

    def stop(self) -> None:
        """Stop every rank."""
        for worker in self.workers:
            worker.stop()
