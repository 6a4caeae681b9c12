"""`PolicyWorker`: what runs where the policy lives, training and sampling on the very same weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nemo_rl.config.schema.policy import PolicyConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import Completion, GenerationRequest
from nemo_rl.distributed.memory import peak_memory_bytes
from nemo_rl.errors import ConfigError
from nemo_rl.generation.hf import HFGenerator
from nemo_rl.interfaces import Objective
from nemo_rl.metrics import Metrics
from nemo_rl.models.load import load_tokenizer, quiet_libraries
from nemo_rl.training.pytorch.backend import PyTorchBackend


class PolicyWorker:
    """A training backend and a colocated sampler; a plain class that an executor starts in some process."""

    def __init__(self, config: PolicyConfig, source: str, *, with_reference: bool = False) -> None:
        """Load the model of the `policy` section from `source` (a folder or a hub name).

        Raises:
            ConfigError: the generation backend is not one that shares the policy's process.
        """
        if config.generation.backend != "hf":
            raise ConfigError(
                f"policy.generation.backend={config.generation.backend} cannot run here yet; use backend=hf"
            )
        quiet_libraries()
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        tokenizer = load_tokenizer(config.tokenizer.name or source, config.tokenizer.chat_template)
        self._backend = PyTorchBackend(config, source, tokenizer, with_reference=with_reference)
        self._generator = HFGenerator(
            self._backend.model,
            decode=lambda token_ids: cast(str, tokenizer.decode(list(token_ids))),
            max_batch_size=config.generation.max_batch_size,
            autocast=self._backend.autocast,
        )

    def train(self, batch: TokenBatch, objective: Objective) -> Metrics:
        """One optimizer step."""
        return self._backend.train(batch, objective)

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """float32 [N], under the current weights."""
        return self._backend.logprobs(batch)

    def reference_logprobs(self, batch: TokenBatch) -> Tensor:
        """float32 [N], under the weights the run started from."""
        with self._backend.reference():
            return self._backend.logprobs(batch)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Sample one completion for every request."""
        return self._generator.generate_now(requests)

    def publish(self, version: int) -> None:
        """Let the sampler answer as this version: the weights are shared, so nothing moves."""
        self._generator.load_weights(None, version)

    def generation_metrics(self) -> Metrics:
        """What the sampler counted since the last call."""
        return self._generator.metrics()

    def save(self, folder: Path) -> None:
        """Write the training state."""
        self._backend.save(folder)

    def load(self, folder: Path) -> None:
        """Restore the training state."""
        self._backend.load(folder)

    def export(self, folder: Path) -> None:
        """Write a Hugging Face model folder."""
        self._backend.export(folder)

    def peak_memory_bytes(self) -> int:
        """The most memory that this process has held."""
        return peak_memory_bytes()

    def describe(self) -> Mapping[str, Any]:
        """What is held here."""
        return self._backend.describe()
