"""`RankedWorker`: the ranks of one model, which a loop calls like one worker."""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count, pairwise
from typing import Any, Protocol

from torch import Tensor

from nemo_rl.data.assignment import assign, join
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.cost import ComputeCost
from nemo_rl.distributed.calls import joined
from nemo_rl.distributed.mesh import ParallelSizes
from nemo_rl.errors import WorkerError
from nemo_rl.interfaces import Future, WorkerHandle
from nemo_rl.metrics import merge

type Arguments = tuple[object, ...]


class Deal(Protocol):
    """Chooses the sequences of each data rank, int64 [n] increasing; see `nemo_rl.data.assignment.assign`."""

    def __call__(self, batch: TokenBatch, num_ranks: int, *, whole_groups: bool) -> list[Tensor]: ...


_COMBINE: Mapping[str, Callable[[list[Any]], Any]] = {
    "generation_metrics": merge,
    "peak_memory_bytes": max,
    "take_peak_memory": max,
    "finish_save": all,
}
"""How the answers of all ranks become one, where it is not the first one's."""

_BY_TOKENS: Deal = partial(assign, cost=ComputeCost())


class RankedWorker:
    """Deals every call to the ranks of a model and joins their answers (see `interfaces.WorkerHandle`).

    A batch is divided among the data ranks; ranks that work on the same sequences get the same part, and one of them
    answers for all. Groups stay whole where there is a loss, which may be one of a group. Requests for samples are
    divided among all ranks, as each has a sampler of its own. Anything else all ranks do, and the first one answers.

    A call fails as soon as one rank fails, and the error has a note that names it.
    """

    def __init__(
        self,
        ranks: Sequence[WorkerHandle],
        sizes: ParallelSizes,
        *,
        deal: Deal = _BY_TOKENS,
        name: str = "model",
        patience_seconds: float = 60.0,
    ) -> None:
        """Take the ranks over.

        Args:
            ranks: in their order.
            sizes: of their mesh.
            deal: chooses the sequences of each data rank.
            name: of what they are together, for messages.
            patience_seconds: after a rank has failed, how long the others may take to end the same call.
        """
        self._ranks, self._sizes = tuple(ranks), sizes
        self._deal, self._name, self._patience = deal, name, patience_seconds
        self._answered, self._idle = threading.Event(), threading.Event()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Future:
        """Call a method of the ranks, each with its part of the arguments, and return at once."""
        match method, args:
            case "train" | "evaluate", (TokenBatch() as batch, *rest):
                parts = self._deal(batch, self._sizes.data, whole_groups=True)
                return self._ask(method, self._dealt(batch, parts, rest), kwargs, lambda all: merge(self._spoken(all)))
            case _, (TokenBatch() as batch, *rest):  # scores of tokens
                parts = self._deal(batch, self._sizes.data, whole_groups=False)
                return self._ask(
                    method,
                    self._dealt(batch, parts, rest),
                    kwargs,
                    lambda all: _whole(batch, parts, self._spoken(all)),
                )
            case "generate", (requests,):
                shares = [(share,) for share in _shares(requests, len(self._ranks))]
                return self._ask(method, shares, kwargs, lambda all: [answer for part in all for answer in part])
            case _:
                combine = _COMBINE.get(method, _first)
                return self._ask(method, [args] * len(self._ranks), kwargs, combine)

    def stop(self) -> None:
        """Stop every rank."""
        for rank in self._ranks:
            rank.stop()

    def _dealt(self, batch: TokenBatch, parts: Sequence[Tensor], rest: Sequence[object]) -> list[Arguments]:
        """The arguments of each rank."""
        batches = [batch.select(part) for part in parts]
        return [(batches[self._sizes.data_rank(rank)], *rest) for rank in range(len(self._ranks))]

    def _spoken(self, answers: Sequence[Any]) -> list[Any]:
        """The answers of those who speak for a part of the data, in the order of the parts."""
        return [answer for rank, answer in enumerate(answers) if self._sizes.speaks(rank)]

    def _ask(
        self, method: str, arguments: Sequence[Arguments], kwargs: dict[str, Any], combine: Callable[[list[Any]], Any]
    ) -> Future:
        self._wait_for_stragglers()
        asked = [rank.call(method, *args, **kwargs) for rank, args in zip(self._ranks, arguments, strict=True)]
        answer = joined(asked, combine, f"{self._name}.{method}")
        self._answered, self._idle = threading.Event(), threading.Event()
        answer.when_done(self._answered.set)
        _when_all_done(asked, self._idle.set)
        return answer

    def _wait_for_stragglers(self) -> None:
        """After a failure let the ranks come together again; end them if one still waits for what will never come."""
        if self._answered.is_set() and not self._idle.wait(self._patience):
            self.stop()
            raise WorkerError(
                f"a rank of {self._name} has failed, and {self._patience:g} s later others still waited for it; they "
                "were stopped"
            )


def _when_all_done(futures: Sequence[Future], callback: Callable[[], object]) -> None:
    ended = count(1)
    for future in futures:
        future.when_done(lambda: next(ended) == len(futures) and callback())


def _shares[Item](items: Sequence[Item], num_ranks: int) -> list[Sequence[Item]]:
    """Consecutive shares of equal size, give or take one: what is alike stands together and is computed once."""
    bounds = [len(items) * rank // num_ranks for rank in range(num_ranks + 1)]
    return [items[start:end] for start, end in pairwise(bounds)]


def _first(answers: Sequence[Any]) -> Any:
    return answers[0]


def _whole(batch: TokenBatch, parts: Sequence[Tensor], answers: Sequence[Any]) -> Any:
    """Join rows [n, ...] of tokens, or tuples of such."""
    if isinstance(answers[0], tuple):
        return tuple(join(batch, column, parts) for column in zip(*answers, strict=True))
    return join(batch, answers, parts)
