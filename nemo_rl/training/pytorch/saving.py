"""Saving a training state now, or from a copy of it in the background while training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import cast

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from nemo_rl.training.pytorch.checkpoint import TrainingState, begin_save, save_state


class Saver:
    """Writes one checkpoint at a time; of a shared state every rank has one, and all are called alike."""

    def __init__(self) -> None:
        """Start with nothing to write."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None

    def save(
        self, folder: Path, state: TrainingState, tokenizer: PreTrainedTokenizerBase, *, in_background: bool
    ) -> None:
        """Write a state after the one before; `in_background`, return as soon as it is copied.

        Raises:
            CheckpointError: the folder, or that of the state before, cannot be written.
        """
        self.finish()
        if not in_background:
            save_state(folder, state, tokenizer)
            return
        if state.is_shared and self._group is None:
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._writing = self._thread.submit(begin_save(folder, state, tokenizer, self._group))

    def finish(self, *, wait: bool = True) -> bool:
        """Whether nothing is being written; with `wait`, return when that is so.

        Raises:
            CheckpointError: what was written in the background could not be.
        """
        if self._writing is None:
            return True
        if not wait and not self._writing.done():
            return False
        writing, self._writing = self._writing, None
        writing.result()
        return True
