"""Every Protocol on one page: read this first.

A loop talks to a `TrainingBackend` and a `GenerationBackend`; what stands behind (this process, a Ray actor, a mesh of
them) is the executor's business. An `Environment` judges what the policy says. An `Objective` is a pure function.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import Completion, GenerationRequest, Message, Outcome
from nemo_rl.metrics import Metrics
from nemo_rl.objectives.logprobs import LogitHead, Reads


class Objective(Protocol):
    """A picklable function from per-token tensors to a per-token loss; it never reduces.

    `reads` says what it is given as `outputs`: `logprobs` the `TokenOutputs` of a language model, `distribution` its
    `DistributionOutputs`, `values` the `ScalarOutputs` of a reward model or a critic, `head_values` the same with a
    gradient for the head alone. `tokens` is the micro-batch cut down to its M loss tokens (still jagged:
    `tokens.cu_seqlens` counts loss tokens, every per-token column is [M]), so that everything aligns with `outputs`.
    The step sums `loss_weights * token_loss`.
    """

    reads: ClassVar[Reads]

    def __call__(self, outputs: Any, tokens: TokenBatch, /) -> tuple[Tensor, Metrics]: ...


class TrainingBackend(Protocol):
    """Holds the policy's weights and changes them."""

    def train(self, batch: TokenBatch, objective: Objective) -> Metrics:
        """One optimizer step on the whole batch."""
        ...

    def evaluate(self, batch: TokenBatch, objective: Objective) -> Metrics:
        """The loss of a batch and its metrics; no weight changes."""
        ...

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """float32 [N]: log-probabilities under the current weights where `loss_mask` is true, 0 elsewhere."""
        ...

    def values(self, batch: TokenBatch) -> Tensor:
        """float32 [N]: the value before each token where `loss_mask` is true, 0 elsewhere; for models with one."""
        ...

    def hold_teachers(self, heads: Sequence[LogitHead]) -> None:
        """Keep the heads of teachers, which `DistributionOutputs.teachers` shows to the objective from then on."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within it, `logprobs` are those of the frozen reference weights."""
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face names and full tensors, streamed; adapters are part of them."""
        ...

    def named_adapter_weights(self) -> Iterator[tuple[str, Tensor]]:
        """PEFT's names and full tensors of the adapters alone, streamed; nothing without adapters."""
        ...

    def offload(self) -> None:
        """Move to the CPU what only an optimizer step reads."""
        ...

    def on_device(self) -> None:
        """Bring it back; `train` does so by itself."""
        ...

    def save(self, folder: Path, *, in_background: bool = False) -> None:
        """Write the training state; `in_background`, return as soon as it is copied and training can go on."""
        ...

    def finish_save(self, *, wait: bool = True) -> bool:
        """Whether what `save` began is written; raises what it failed with. With `wait`, return when it is."""
        ...

    def load(self, folder: Path) -> None: ...
    def export(self, folder: Path) -> None:
        """Write a Hugging Face model folder."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Parameters, device, precision, `optimizer_steps` begun: equal as long as the weights are."""
        ...


class TeacherBackend(Protocol):
    """Says what another model would have written; never changes. Rows of tokens without loss are 0."""

    def topk_logprobs(self, batch: TokenBatch, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest tokens in place of each token: log-probabilities float32 [N, k] and ids int32 [N, k]."""
        ...

    def last_hidden(self, batch: TokenBatch) -> Tensor:
        """[N, H], what the head turns into the logits of each token: as good as all of them, and smaller."""
        ...

    def head(self) -> LogitHead:
        """The LM head, to travel once to where logits are compared."""
        ...


class Sampler(Protocol):
    """Samples from the policy: token ids in, token ids out."""

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]: ...
    def metrics(self) -> Metrics:
        """What it counted since the last call."""
        ...


class GenerationBackend(Sampler, Protocol):
    """A sampler that is given weights and can make room for training."""

    def load_weights(self, weights: Iterator[tuple[str, Tensor]] | None, version: int) -> None:
        """Take these weights (None: they are shared and already in place) and answer as `version` from now on."""
        ...

    def sleep(self) -> None: ...
    def wake(self) -> None: ...
    def reset_prefix_cache(self) -> None: ...


class Environment(Protocol):
    """Judges one policy turn and, in a conversation of several turns, answers it."""

    async def step(self, messages: Sequence[Message], extra: Mapping[str, Any], state: Any = None) -> Outcome:
        """Judge the last message of the conversation (the policy's).

        Raises:
            EnvironmentFailure: it cannot judge; the rollout's whole group is dropped and counted, never scored zero.
        """
        ...

    async def close(self) -> None: ...


class Future(Protocol):
    """A result on its way from a worker; `await` it in an event loop, `result()` anywhere else."""

    def result(self, timeout: float | None = None) -> Any:
        """Wait for it; an exception in the worker is raised here, with the remote traceback."""
        ...

    def when_done(self, callback: Callable[[], object]) -> None:
        """Call back once the call has ended, from another thread or at once."""
        ...

    def __await__(self) -> Generator[Any, None, Any]: ...


class WorkerHandle(Protocol):
    """A worker object somewhere; `call` starts one of its methods and returns at once."""

    def call(self, method: str, *args: Any, **kwargs: Any) -> Future: ...
    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Resources:
    """What one worker needs: CPU cores, GPUs, environment variables of its process."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    env_vars: Mapping[str, str] = field(default_factory=dict)


class Executor(Protocol):
    """Starts workers. A context manager: leaving it stops every worker it started."""

    def start(
        self, worker: Callable[..., Any], *args: Any, resources: Resources | None = None, **kwargs: Any
    ) -> WorkerHandle:
        """Construct `worker(*args, **kwargs)` in its place and wait until it stands."""
        ...

    def start_group(
        self, worker: Callable[..., Any], arguments: Sequence[Mapping[str, Any]], resources: Resources | None = None
    ) -> list[WorkerHandle]:
        """Start `worker(**arguments[rank])` for every rank in a process of its own; all of them stand or none does.

        They are constructed at the same time, so they may meet while they are.
        """
        ...

    def host_address(self) -> str:
        """The address of the driver's machine, as its workers reach it."""
        ...

    def shutdown(self) -> None: ...
    def __enter__(self) -> "Executor": ...
    def __exit__(self, *exc: object) -> None: ...
