"""`Loader`: an endless stream of items that continues exactly where a checkpoint was taken."""

import logging
import random
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from nemo_rl.data.datasets.streams import ItemStream, Source, Walk
from nemo_rl.data.types import ItemDataset, Task
from nemo_rl.errors import CheckpointError, DataError

type Processor[Item, Ready] = Callable[[Item], Ready | None]

_log = logging.getLogger(__name__)


def one_pass[Item, Ready](dataset: Source[Item], processor: Processor[Item, Ready]) -> Iterator[Ready]:
    """Go through a data set once, in order; an item is read and processed when it is asked for.

    How many the processor turned down is logged in the end.
    """
    num_seen = num_skipped = 0
    for raw in dataset.once() if isinstance(dataset, ItemStream) else map(dataset.__getitem__, range(len(dataset))):
        num_seen += 1
        item = processor(raw)
        if item is None:
            num_skipped += 1
        else:
            yield item
    if num_skipped:
        _log.info("%d of %d records are too long and are left out", num_skipped, num_seen)


class Loader[Item, Ready]:
    """Draws batches of exactly `num_prompts` items, endlessly: tasks, conversations or pairs.

    Every epoch is a new permutation decided by (seed, epoch) alone. The permutations follow each other without a seam:
    a batch that an epoch cannot fill is filled from the next one, so every epoch shows every item once. An item that
    the processor turns down (a prompt too long) is passed over and counted, and the batch is still full.

    A stream is shuffled in blocks (see `ItemStream`), and every loader process reads a shard of its own, of which it
    begins another pass whenever it comes to the end; `epoch` counts the passes that all have completed.
    """

    def __init__(
        self,
        dataset: Source[Item],
        num_prompts: int,
        processor: Processor[Item, Ready],
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        """Prepare to draw; nothing is read yet.

        Args:
            dataset: where the items come from.
            num_prompts: items in one batch.
            processor: makes an item ready, in the loader processes if there are any; its None means skip.
            shuffle: permute every epoch; otherwise the data set's own order.
            seed: decides the permutations.
            num_workers: loader processes, to which data set and processor are pickled; 0 works in this one.

        Raises:
            DataError: the data set is empty, or `num_prompts` is not positive.
        """
        if num_prompts < 1:
            raise DataError(f"a batch of {num_prompts} prompts was asked for; it needs at least 1")
        self.num_prompts = num_prompts
        self.num_drawn = 0
        self.num_skipped = 0
        self._passes = [0] * max(1, num_workers)
        own_seed = seed if shuffle else None
        if isinstance(dataset, ItemStream):
            self._num_tasks, known = None, dataset.description
            ready, order = _Streamed(dataset, processor, own_seed), None
        else:
            self._num_tasks = len(dataset)
            if not self._num_tasks:
                raise DataError("the training data set is empty; check the path and the split in data.train")
            known = {"num_tasks": self._num_tasks, "fingerprint": dataset.fingerprint}
            ready, order = _Processed(dataset, processor), _EpochSampler(self._num_tasks, own_seed)
        self._identity = {**known, "seed": seed, "shuffle": shuffle, "num_workers": num_workers}
        with warnings.catch_warnings():
            # torchdata 0.11.0 calls what torch 2.13 deprecates; https://github.com/meta-pytorch/data
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            self._loader = StatefulDataLoader(
                ready,
                batch_size=None,
                sampler=order,
                num_workers=num_workers,
                collate_fn=_as_it_is,
                # A fork of a process with torch's (or Ray's) threads can hang.
                multiprocessing_context="forkserver" if num_workers else None,
                worker_init_fn=_leave_interrupts_to_the_run,
            )
        self._draws: Iterator[tuple[Ready | None, int]] | None = None

    @property
    def epoch(self) -> int:
        """How often the whole data set has been shown."""
        return min(self._passes) if self._num_tasks is None else self.num_drawn // self._num_tasks

    def __iter__(self) -> Self:
        """A loader is its own, endless iterator."""
        return self

    def __next__(self) -> list[Ready]:
        """Draw the next batch.

        Raises:
            DataError: a whole epoch went by and every item was skipped.
        """
        if self._draws is None:
            self._draws = iter(self._loader)
        batch: list[Ready] = []
        begun = last = self.epoch
        while len(batch) < self.num_prompts:
            item, num_passes = next(self._draws)
            self._passes[self.num_drawn % len(self._passes)] = num_passes  # the loader processes take turns
            self.num_drawn += 1
            if item is None:
                self.num_skipped += 1
            else:
                batch.append(item)
                begun = self.epoch
            if self.epoch > last:
                last = self.epoch
                self._tell_skipped()
            if self.epoch > begun + 1:
                which = "all" if self._num_tasks is None else f"all {self._num_tasks}"
                raise DataError(
                    f"{which} tasks were skipped because their prompts are too long; raise data.max_input_seq_length"
                )
        return batch

    def _tell_skipped(self) -> None:
        """Say after the first pass how many items it left out; the others leave out the same."""
        if self.epoch == 1 and self.num_skipped:
            count, total = self.num_skipped, self.num_drawn
            _log.info("%d of %d training records are too long and are left out", count, total)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, after the last batch drawn: plain numbers and strings, so JSON keeps it too."""
        return {
            "data": self._identity,
            "num_drawn": self.num_drawn,
            "num_skipped": self.num_skipped,
            "passes": list(self._passes),
            "loader": self._loader.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; the next batch is the one that would have followed.

        Raises:
            CheckpointError: the data set, the seed, the order or the number of loader processes changed since, or it is
                not what `state_dict` gives.
        """
        match state:
            case {
                "data": {**was},
                "num_drawn": int(),
                "num_skipped": int(),
                "passes": [*passes],
                "loader": {**position},
            } if position:
                self._check_same_data(was)
            case _:
                raise CheckpointError(
                    "the place in the training data is not in the form in which a checkpoint holds it; delete this "
                    "checkpoint to resume from an earlier one"
                )
        self.num_drawn, self.num_skipped = state["num_drawn"], state["num_skipped"]
        self._passes = passes
        self._loader.load_state_dict(position)
        self._draws = None

    def _check_same_data(self, was: Mapping[str, Any]) -> None:
        now = self._identity
        changed = [name for name, value in now.items() if was.get(name) != value]
        if changed:
            difference = ", ".join(f"{name} was {was.get(name)} and is {now[name]}" for name in changed)
            raise CheckpointError(
                f"the training data changed since the checkpoint ({difference}); restore the data "
                "section and the seed that it was made with, or start a new run"
            )


TaskLoader = Loader[Task, Task]
"""Draws problems for the policy."""


class _Processed[Item, Ready](Dataset[tuple[Ready | None, int]]):
    """A data set whose items are processed as they are read; it knows nothing of passes, which are always 0."""

    def __init__(self, dataset: ItemDataset[Item], processor: Processor[Item, Ready]) -> None:
        self._dataset = dataset
        self._processor = processor

    def __getitem__(self, index: int) -> tuple[Ready | None, int]:
        return self._processor(self._dataset[index]), 0


class _Streamed[Item, Ready](IterableDataset[tuple[Ready | None, int]]):
    """A stream whose items are processed as they are read; each loader process reads a shard."""

    def __init__(self, stream: ItemStream[Item], processor: Processor[Item, Ready], seed: int | None) -> None:
        self._stream = stream
        self._processor = processor
        self._seed = seed

    def __iter__(self) -> "_ReadyWalk[Item, Ready]":
        process = get_worker_info()
        shard, num_shards = (0, 1) if process is None else (process.id, process.num_workers)
        return _ReadyWalk(self._stream.walk(seed=self._seed, shard=shard, num_shards=num_shards), self._processor)


class _ReadyWalk[Item, Ready](Iterator[tuple[Ready | None, int]]):
    """Items of a stream, processed, each with the number of passes that it completes."""

    def __init__(self, walk: Walk[Item], processor: Processor[Item, Ready]) -> None:
        self._walk = walk
        self._processor = processor

    def __next__(self) -> tuple[Ready | None, int]:
        item, num_passes = next(self._walk)
        return self._processor(item), num_passes

    def state_dict(self) -> dict[str, Any]:
        return self._walk.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._walk.load_state_dict(state)


class _EpochSampler(Sampler[int]):
    """Endless indices, one permutation after the other; in order when there is no seed."""

    def __init__(self, num_tasks: int, seed: int | None) -> None:
        self.num_tasks = num_tasks
        self.seed = seed

    def __iter__(self) -> "_Draws":
        return _Draws(self.num_tasks, self.seed)


class _Draws(Iterator[int]):
    """The position in the endless stream; the permutation at hand is a function of it."""

    def __init__(self, num_tasks: int, seed: int | None) -> None:
        self._num_tasks = num_tasks
        self._seed = seed
        self._num_drawn = 0
        self._order: list[int] = []

    def __next__(self) -> int:
        epoch, position = divmod(self._num_drawn, self._num_tasks)
        if position == 0 or not self._order:
            self._order = self._permutation(epoch)
        self._num_drawn += 1
        return self._order[position]

    def _permutation(self, epoch: int) -> list[int]:
        if self._seed is None:
            return list(range(self._num_tasks))
        # Not seed + epoch: epoch 1 of seed 0 must not be epoch 0 of seed 1.
        generator = torch.Generator().manual_seed(random.Random(f"{self._seed}/{epoch}").getrandbits(63))
        return torch.randperm(self._num_tasks, generator=generator).tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"num_drawn": self._num_drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_drawn = state["num_drawn"]
        self._order = []


def _leave_interrupts_to_the_run(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; a loader that it ended would take the run along."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is[T](item: T) -> T:
    return item
