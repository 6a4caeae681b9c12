"""Models as a loop sees them: `TrainingBackend` and `GenerationBackend`, wherever their workers live."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import Completion, GenerationRequest
from nemo_rl.interfaces import Objective, WorkerHandle
from nemo_rl.metrics import Metrics
from nemo_rl.objectives.logprobs import LogitHead


class Learner:
    """A model that is trained, such as a critic; every call waits for its worker."""

    def __init__(self, worker: WorkerHandle) -> None:
        self._worker = worker

    def train(self, batch: TokenBatch, objective: Objective) -> Metrics:
        """One optimizer step on the whole batch."""
        return self._worker.call("train", batch, objective).result()

    def evaluate(self, batch: TokenBatch, objective: Objective) -> Metrics:
        """The loss of a batch and its metrics; no weight changes."""
        return self._worker.call("evaluate", batch, objective).result()

    def values(self, batch: TokenBatch) -> Tensor:
        """float32 [N], the value before each loss token."""
        return self._worker.call("values", batch).result()

    def save(self, folder: Path, *, in_background: bool = False) -> None:
        """Write the training state; `in_background`, return as soon as it is copied."""
        self._worker.call("save", folder, in_background=in_background).result()

    def finish_save(self, *, wait: bool = True) -> bool:
        """Whether what `save` began is written, on every rank; raises what it failed with."""
        return self._worker.call("finish_save", wait=wait).result()

    def load(self, folder: Path) -> None:
        """Restore the training state."""
        self._worker.call("load", folder).result()

    def export(self, folder: Path) -> None:
        """Write a Hugging Face model folder."""
        self._worker.call("export", folder).result()

    def peak_memory_bytes(self) -> int:
        """The most memory that the worker's process has held."""
        return self._worker.call("peak_memory_bytes").result()

    def take_peak_memory(self) -> int:
        """The most memory that the worker's process has held since this was last asked."""
        return self._worker.call("take_peak_memory").result()

    def describe(self) -> Mapping[str, Any]:
        """What the worker holds."""
        return self._worker.call("describe").result()


class Policy(Learner):
    """The policy: its tokens have probabilities, and a sampler answers with its weights."""

    def __init__(self, worker: WorkerHandle) -> None:
        super().__init__(worker)
        self._logprobs = "logprobs"

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """float32 [N], of the loss tokens under the current weights (within `reference`, under the frozen ones)."""
        return self._worker.call(self._logprobs, batch).result()

    @contextmanager
    def reference(self) -> Generator[None]:
        """Within it, `logprobs` are those of the weights the run started from."""
        self._logprobs = "reference_logprobs"
        try:
            yield
        finally:
            self._logprobs = "logprobs"

    def publish(self, version: int) -> None:
        """Let the sampler answer with the current weights, as this version."""
        self._worker.call("publish", version).result()

    def hold_teachers(self, heads: Sequence[LogitHead]) -> None:
        """Let objectives compare with teachers of whose hidden states these heads make logits; they travel once."""
        self._worker.call("hold_teachers", heads).result()


class ColocatedGenerator:
    """Samples in the policy's own worker."""

    def __init__(self, worker: WorkerHandle) -> None:
        self._worker = worker

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Sample one completion for every request without blocking the event loop."""
        return await self._worker.call("generate", requests)

    def metrics(self) -> Metrics:
        """What the sampler counted since the last call."""
        return self._worker.call("generation_metrics").result()
