"""`TaskLoader`: an endless stream of tasks that continues exactly where a checkpoint was taken."""

import random
import warnings
from collections.abc import Callable, Iterator
from itertools import batched
from typing import Any, Self

import torch
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from nemo_rl.data.types import Task, TaskDataset
from nemo_rl.errors import CheckpointError, DataError

type Processor = Callable[[Task], Task | None]


def one_pass(dataset: TaskDataset, num_prompts: int, processor: Processor) -> Iterator[tuple[Task, ...]]:
    """Go through a data set once, in order; the last batch may be smaller, so that no task is left out."""
    tasks = (processor(dataset[index]) for index in range(len(dataset)))
    return batched((task for task in tasks if task is not None), num_prompts)


class TaskLoader:
    """Draws batches of exactly `num_prompts` tasks, endlessly.

    Every epoch is a new permutation decided by (seed, epoch) alone. The permutations follow each other without a seam:
    a batch that an epoch cannot fill is filled from the next one, so every epoch shows every task once. A task that
    the processor turns down (a prompt too long) is passed over and counted, and the batch is still full.
    """

    def __init__(
        self,
        dataset: TaskDataset,
        num_prompts: int,
        processor: Processor,
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        """Prepare to draw; nothing is read yet.

        Args:
            dataset: where the tasks come from.
            num_prompts: tasks in one batch.
            processor: applied to every task, in the loader processes if there are any; its None means skip.
            shuffle: permute every epoch; otherwise the data set's own order.
            seed: decides the permutations.
            num_workers: loader processes, to which data set and processor are pickled; 0 works in this one.

        Raises:
            DataError: the data set is empty, or `num_prompts` is not positive.
        """
        if not len(dataset):
            raise DataError("the training data set is empty; check the path and the split in data.train")
        if num_prompts < 1:
            raise DataError(f"a batch of {num_prompts} prompts was asked for; it needs at least 1")
        self.num_prompts = num_prompts
        self.num_drawn = 0
        self.num_skipped = 0
        self._num_tasks = len(dataset)
        self._identity = {
            "num_tasks": len(dataset),
            "fingerprint": dataset.fingerprint,
            "seed": seed,
            "shuffle": shuffle,
            "num_workers": num_workers,
        }
        with warnings.catch_warnings():
            # torchdata 0.11.0 calls what torch 2.13 deprecates; https://github.com/meta-pytorch/data
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            self._loader = StatefulDataLoader(
                _Processed(dataset, processor),
                batch_size=None,
                sampler=_EpochSampler(len(dataset), seed if shuffle else None),
                num_workers=num_workers,
                collate_fn=_as_it_is,
                # A fork of a process with torch's (or Ray's) threads can hang.
                multiprocessing_context="forkserver" if num_workers else None,
            )
        self._tasks: Iterator[Task | None] | None = None

    @property
    def epoch(self) -> int:
        """How often the whole data set has been shown."""
        return self.num_drawn // self._num_tasks

    def __iter__(self) -> Self:
        """A loader is its own, endless iterator."""
        return self

    def __next__(self) -> list[Task]:
        """Draw the next batch.

        Raises:
            DataError: a whole epoch went by and every task was skipped.
        """
        if self._tasks is None:
            self._tasks = iter(self._loader)
        batch: list[Task] = []
        skipped_in_a_row = 0
        while len(batch) < self.num_prompts:
            task = next(self._tasks)
            self.num_drawn += 1
            if task is not None:
                batch.append(task)
                skipped_in_a_row = 0
                continue
            self.num_skipped += 1
            skipped_in_a_row += 1
            if skipped_in_a_row >= 2 * self._num_tasks:
                raise DataError(
                    f"all {self._num_tasks} tasks were skipped because their prompts are too long; "
                    "raise data.max_input_seq_length"
                )
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, after the last batch drawn: plain numbers and strings, so JSON keeps it too."""
        return {
            "data": self._identity,
            "num_drawn": self.num_drawn,
            "num_skipped": self.num_skipped,
            "loader": self._loader.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; the next batch is the one that would have followed.

        Raises:
            CheckpointError: the data set, the seed, the order or the number of loader processes changed since.
        """
        changed = [name for name, value in self._identity.items() if state["data"].get(name) != value]
        if changed:
            was, now = state["data"], self._identity
            difference = ", ".join(f"{name} was {was.get(name)} and is {now[name]}" for name in changed)
            raise CheckpointError(
                f"the training data changed since the checkpoint ({difference}); restore the data "
                "section and the seed that it was made with, or start a new run"
            )
        self.num_drawn = state["num_drawn"]
        self.num_skipped = state["num_skipped"]
        self._loader.load_state_dict(state["loader"])
        self._tasks = None


class _Processed(Dataset[Task | None]):
    """A data set whose tasks are processed as they are read."""

    def __init__(self, dataset: TaskDataset, processor: Processor) -> None:
        self._dataset = dataset
        self._processor = processor

    def __getitem__(self, index: int) -> Task | None:
        return self._processor(self._dataset[index])


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


def _as_it_is[T](item: T) -> T:
    return item
