"""`TrainWorker`: what runs where a policy lives that is trained and never sampled."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_rl.config.schema.policy import TrainedPolicyConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.distributed.memory import PeakMemory
from nemo_rl.distributed.mesh import RankPlace
from nemo_rl.interfaces import Objective
from nemo_rl.metrics import Metrics
from nemo_rl.models.load import load_tokenizer, quiet_libraries
from nemo_rl.objectives.logprobs import LogitHead
from nemo_rl.training.pytorch.backend import PyTorchBackend
from nemo_rl.training.pytorch.loading import Head, choose_device


class TrainWorker:
    """A training backend; a plain class that an executor starts in some process."""

    def __init__(
        self,
        config: TrainedPolicyConfig,
        source: str,
        *,
        head: Head = "language",
        with_reference: bool = False,
        place: RankPlace | None = None,
    ) -> None:
        """Load the model of the `policy` section, with that head, from `source` (a folder or a hub name).

        With a `place` this is one rank of the model, and the others meet it there meanwhile.
        """
        quiet_libraries()
        self._memory = PeakMemory()
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._tokenizer = load_tokenizer(config.tokenizer.name or source, config.tokenizer.chat_template)
        is_cuda = choose_device(config.device).type == "cuda"
        self._mesh = None if place is None else place.join("cuda" if is_cuda else "cpu")
        self._backend = PyTorchBackend(
            config, source, self._tokenizer, head=head, with_reference=with_reference, mesh=self._mesh
        )

    def train(self, batch: TokenBatch, objective: Objective) -> Metrics:
        """One optimizer step."""
        return self._backend.train(batch, objective)

    def evaluate(self, batch: TokenBatch, objective: Objective) -> Metrics:
        """The loss and its metrics; no weight changes."""
        return self._backend.evaluate(batch, objective)

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """float32 [N], under the current weights."""
        return self._backend.logprobs(batch)

    def values(self, batch: TokenBatch) -> Tensor:
        """float32 [N], the value before each loss token."""
        return self._backend.values(batch)

    def reference_logprobs(self, batch: TokenBatch) -> Tensor:
        """float32 [N], under the weights the run started from."""
        with self._backend.reference():
            return self._backend.logprobs(batch)

    def hold_teachers(self, heads: Sequence[LogitHead]) -> None:
        """Keep the heads of teachers."""
        self._backend.hold_teachers(heads)

    def save(self, folder: Path, *, in_background: bool = False) -> None:
        """Write the training state, or begin to."""
        self._backend.save(folder, in_background=in_background)

    def finish_save(self, *, wait: bool = True) -> bool:
        """Whether the training state is written."""
        return self._backend.finish_save(wait=wait)

    def load(self, folder: Path) -> None:
        """Restore the training state."""
        self._backend.load(folder)

    def export(self, folder: Path) -> None:
        """Write a Hugging Face model folder."""
        self._backend.export(folder)

    def peak_memory_bytes(self) -> int:
        """The most memory that this process has held."""
        return self._memory.highest

    def take_peak_memory(self) -> int:
        """The most since this was last called, on the GPU if there is one."""
        return self._memory.take()

    def describe(self) -> Mapping[str, Any]:
        """What is held here."""
        return self._backend.describe()
