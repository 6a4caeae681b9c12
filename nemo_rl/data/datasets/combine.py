"""Data sets made of data sets: parts, repetitions and mixtures."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nemo_rl.data.types import Chat, ChatPair, ItemDataset, Task
from nemo_rl.errors import DataError


class Combined[Item: (Task, Chat, ChatPair)]:
    """Items of several data sets in a new order; position i becomes the index of item i."""

    def __init__(self, datasets: Sequence[ItemDataset[Item]], places: Tensor) -> None:
        """Take the items.

        Args:
            datasets: where they come from.
            places: int64 [n, 2], data set and position in it, for each item.
        """
        self._datasets = datasets
        self._places = places

    def __len__(self) -> int:
        """Number of items."""
        return len(self._places)

    def __getitem__(self, index: int) -> Item:
        """Item `index`.

        Raises:
            IndexError: the index is outside of the data set.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        dataset, place = self._places[index].tolist()
        return replace(self._datasets[dataset][place], index=index)

    @property
    def fingerprint(self) -> str:
        """Hash of the data sets and of the order."""
        digest = hashlib.sha256(repr([dataset.fingerprint for dataset in self._datasets]).encode())
        digest.update(self._places.numpy().tobytes())
        return digest.hexdigest()


def repeated[Item: (Task, Chat, ChatPair)](dataset: ItemDataset[Item], times: int) -> Combined[Item]:
    """Show a data set several times in one pass."""
    return part(dataset, torch.arange(len(dataset)).repeat(times))


def split_off_parts[Item: (Task, Chat, ChatPair)](
    datasets: Sequence[ItemDataset[Item]], size: float, *, seed: int
) -> list[tuple[ItemDataset[Item], ItemDataset[Item] | None]]:
    """Draw a validation set from several data sets, from each in proportion to its items; see `split_off`.

    Returns:
        Of each data set what is left, and what was drawn or None for nothing.

    Raises:
        DataError: nothing would be left of one of them.
    """
    lengths = torch.tensor([len(dataset) for dataset in datasets], dtype=torch.float64)
    total = int(lengths.sum())
    wanted = int(size) if size >= 1 else max(1, round(size * total))
    exact = lengths * wanted / total
    counts = exact.floor().long()
    largest_rest = (exact - counts).argsort(descending=True, stable=True)
    counts[largest_rest[: wanted - int(counts.sum())]] += 1
    return [
        split_off(dataset, count, seed=seed) if count else (dataset, None)
        for dataset, count in zip(datasets, counts.tolist(), strict=True)
    ]


def split_off[Item: (Task, Chat, ChatPair)](
    dataset: ItemDataset[Item], size: float, *, seed: int
) -> tuple[Combined[Item], Combined[Item]]:
    """Draw a validation set without replacement: what is left, and what was drawn, each in its old order.

    Args:
        dataset: what is divided.
        size: a number of items, or below 1 a share of them (at least one item).
        seed: decides together with the number of items which ones.

    Raises:
        DataError: nothing would be left to train on.
    """
    count = int(size) if size >= 1 else max(1, round(size * len(dataset)))
    if count >= len(dataset):
        raise DataError(
            f"a validation set of {count} leaves nothing of the {len(dataset)} records to train on; lower "
            "data.split_validation_size"
        )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return part(dataset, order[count:].sort().values), part(dataset, order[:count].sort().values)


def mixture[Item: (Task, Chat, ChatPair)](
    datasets: Sequence[ItemDataset[Item]], weights: Sequence[float | None]
) -> Combined[Item]:
    """Mix data sets so that in every stretch of a pass their shares are those of their weights (None: their sizes).

    A pass shows every item at least once: the data set that is longest for its weight sets the length, the others begin
    again when they end.

    Raises:
        DataError: there is nothing to mix.
    """
    if not datasets:
        raise DataError("a mixture of no data sets was asked for; give at least one")
    lengths = torch.tensor([len(dataset) for dataset in datasets], dtype=torch.float64)
    given = [len(dataset) if weight is None else weight for dataset, weight in zip(datasets, weights, strict=True)]
    shares = torch.tensor(given, dtype=torch.float64)
    counts = (shares * (lengths / shares).max()).round().long()
    owner = torch.arange(len(datasets)).repeat_interleave(counts)
    turn = torch.cat([torch.arange(count) for count in counts.tolist()])
    # Item k of n stands at (k + 1/2) / n of the pass.
    order = ((turn + 0.5) / counts[owner]).argsort(stable=True)
    return Combined(datasets, torch.stack([owner, turn % lengths.long()[owner]], dim=1)[order])


def part[Item: (Task, Chat, ChatPair)](dataset: ItemDataset[Item], places: Tensor) -> Combined[Item]:
    """Take the items at these places (int64 [n]) of a data set."""
    return Combined([dataset], torch.stack([torch.zeros_like(places), places], dim=1))
