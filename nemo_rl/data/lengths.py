"""How many tokens each record has: measured once, kept, and used to leave out what is too long before a run begins."""

import hashlib
import logging
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nemo_rl.atomic import write_bytes_atomically
from nemo_rl.data.datasets.combine import part
from nemo_rl.data.types import Chat, ChatPair, ItemDataset, Task
from nemo_rl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


class Track(Protocol):
    """Shows how far a long count is; see `nemo_rl.observe.console.Console.track`."""

    def __call__(self, items: Iterable[int], name: str, total: int, /) -> Iterable[int]: ...


def unseen(items: Iterable[int], name: str, total: int) -> Iterable[int]:
    """Show nothing."""
    del name, total
    return items


@dataclass(frozen=True, slots=True)
class LengthCache:
    """Where lengths are kept from one start to the next (None: nowhere), and what shows that they are counted."""

    folder: Path | None = None
    track: Track = unseen


UNCACHED = LengthCache()
"""Counts anew at every start."""


@dataclass(frozen=True, slots=True)
class LengthFilter:
    """Leaves out what is too long, before a run begins.

    Attributes:
        limit: the most tokens of an item.
        tokenizer: by which they are counted.
        cache: keeps the lengths.
        num_workers: processes that count; 0 does it in this one.
    """

    limit: int
    tokenizer: "PreTrainedTokenizerBase"
    cache: LengthCache = UNCACHED
    num_workers: int = 0

    def fitting[Item: (Task, Chat, ChatPair)](
        self, dataset: ItemDataset[Item], length: Callable[[Item], int], about: Sequence[object]
    ) -> ItemDataset[Item]:
        """Take the items that are short enough, in their order, and say how many are not.

        Args:
            dataset: the items.
            length: tokens of an item.
            about: what else decides the length, e.g. the prompt format.

        Raises:
            DataError: an item cannot be made into tokens, or all are too long.
        """
        lengths = self.lengths(dataset, length, about)
        kept = (lengths <= self.limit).nonzero().flatten()
        if not len(kept):
            raise DataError(
                f"all {len(lengths)} training records are longer than {self.limit} tokens (the shortest has "
                f"{int(lengths.min())}); raise data.max_input_seq_length"
            )
        dropped = len(lengths) - len(kept)
        _log.info(
            "%d of %d training records are longer than %d tokens and are left out", dropped, len(lengths), self.limit
        )
        return dataset if not dropped else part(dataset, kept)

    def lengths[Item](
        self, dataset: ItemDataset[Item], length: Callable[[Item], int], about: Sequence[object]
    ) -> Tensor:
        """Measure all items, or read what an earlier start measured: int64 [n].

        Raises:
            DataError: an item cannot be made into tokens.
        """
        if self.cache.folder is None:
            return self._measure(dataset, length)
        key = _key(dataset.fingerprint, self.tokenizer, about)
        path = self.cache.folder / f"{key}.npz"
        kept = _read(path, len(dataset))
        if kept is None:
            kept = self._measure(dataset, length)
            _write(path, kept)
        return kept

    def _measure[Item](self, dataset: ItemDataset[Item], length: Callable[[Item], int]) -> Tensor:
        total = len(dataset)
        _log.info("counting the tokens of %d training records", total)
        counted = DataLoader(
            _Lengths(dataset, length),
            batch_size=None,
            num_workers=self.num_workers,
            multiprocessing_context="forkserver" if self.num_workers else None,
        )
        return torch.tensor(list(self.cache.track(counted, "counting tokens", total)), dtype=torch.int64)


class _Lengths[Item](Dataset[int]):
    """The lengths of the items of a data set."""

    def __init__(self, dataset: ItemDataset[Item], length: Callable[[Item], int]) -> None:
        self._dataset = dataset
        self._length = length

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> int:
        return self._length(self._dataset[index])


def _key(fingerprint: str, tokenizer: "PreTrainedTokenizerBase", about: Sequence[object]) -> str:
    """Equal where all is equal that lengths depend on: data, tokenizer, chat template, prompt."""
    fast: Any = tokenizer
    parts = (fingerprint, fast.backend_tokenizer.to_str(), tokenizer.chat_template, about, transformers.__version__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _read(path: Path, size: int) -> Tensor | None:
    """What an earlier start wrote; None, with a warning where it is damaged, if there is nothing of use."""
    try:
        with np.load(path, allow_pickle=False) as file:
            lengths = torch.from_numpy(file["lengths"]).long()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error)
    else:
        if lengths.shape == (size,):
            return lengths
        reason = f"it has {tuple(lengths.shape)} numbers for {size} records"
    _log.warning("the token counts in %s are damaged (%s); they are made again", path, reason)
    return None


def _write(path: Path, lengths: Tensor) -> None:
    """Keep lengths; a zip file, whose checksum shows damage. A run goes on without a place to keep them."""
    content = BytesIO()
    np.savez_compressed(content, lengths=lengths.numpy())
    try:
        write_bytes_atomically(path, content.getvalue())
    except OSError as error:
        _log.warning("the token counts cannot be kept in %s (%s)", path.parent, error.strerror)
