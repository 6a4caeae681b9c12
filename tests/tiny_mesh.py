"""One training job over a mesh and in one process: the same global batch, per-parameter gradients, updated weights."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nemo_rl.config.schema.policy import PolicyConfig
from nemo_rl.data.assignment import assign
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.cost import ComputeCost
from nemo_rl.distributed.mesh import Mesh, ParallelSizes
from nemo_rl.interfaces import Objective
from nemo_rl.metrics import Metrics, merge, scalars
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.objectives.preference import PreferenceObjective
from nemo_rl.objectives.supervised import SupervisedObjective
from nemo_rl.training.pytorch.backend import PyTorchBackend
from nemo_rl.training.pytorch.shards import whole
from tiny_batches import rollout_batch
from tiny_models import embedded_folder, tiny_model


@dataclass(frozen=True)
class Job:
    """What is trained: three optimizer steps on one batch.

    Attributes:
        objective: of `OBJECTIVES`.
        share_prefixes: compute what sequences have in common once.
        max_tokens: budget of a micro-batch; 1 gives every sequence its own.
        settings: of the `policy` section.
    """

    objective: str
    share_prefixes: bool
    max_tokens: int
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.objective} shared={self.share_prefixes} tokens={self.max_tokens}"


MODEL: dict[str, Any] = {"num_hidden_layers": 4}
"""A llama that four pipeline stages can share."""


def feed_forward_plan(model: PreTrainedModel) -> dict[str, str]:
    """A plan of a user's own, which leaves attention whole."""
    assert model.config.model_type == "llama"
    block = "model.layers.*.mlp"
    return {f"{block}.gate_proj": "colwise", f"{block}.up_proj": "colwise", f"{block}.down_proj": "rowwise"}


OBJECTIVES: dict[str, Objective] = {
    "sft": SupervisedObjective(),
    "grpo": ClippedPolicyObjective(kl_weight=0.1),
    "dpo": PreferenceObjective(beta=0.5, sft_weight=0.1),
}


def job_batch(job: Job) -> TokenBatch:
    """The global batch: three groups of three answers, or for DPO four pairs; lengths differ."""
    batch = rollout_batch(tiny_model("llama"), temperature=0.8)
    if job.objective != "dpo":
        return batch
    apart = replace(batch, group_ids=torch.arange(9)).select([0, 2, 3, 5, 6, 8, 1, 7])
    pairs = replace(apart, group_ids=torch.arange(4).repeat_interleave(2))
    weights = torch.zeros(pairs.num_tokens)
    mask = pairs.token_columns["loss_mask"]
    counts = torch.zeros(8).index_add_(0, pairs.sequence_ids(), mask.float())
    weights[mask] = (1 / counts / 4)[pairs.sequence_ids()][mask] / 2
    return pairs.with_columns(loss_weights=weights).with_sequence_columns(chosen=torch.tensor([True, False] * 4))


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """Any; to load it takes longer than to train a job."""
    return AutoTokenizer.from_pretrained(embedded_folder())


def policy_config(folder: Path, **settings: Any) -> PolicyConfig:
    """The `policy` section of a model in a folder: float32 on a CPU, plain SGD with learning rate 1."""
    defaults: dict[str, Any] = {
        "model_name": str(folder),
        "train_global_batch_size": 9,
        "max_total_sequence_length": 64,
        "precision": "float32",
        "device": "cpu",
        "optimizer": {"name": "torch.optim.SGD", "kwargs": {"lr": 1.0}},
        "generation": {"backend": "hf", "max_new_tokens": 8},
    }
    return PolicyConfig.model_validate(defaults | settings)


def own_part(batch: TokenBatch, mesh: Mesh) -> TokenBatch:
    """What a rank is given of a global batch."""
    whole_groups = "chosen" in batch.sequence_columns
    parts = assign(batch, mesh.sizes.data, ComputeCost(1, 0), whole_groups=whole_groups)
    return batch.select(parts[mesh.sizes.data_rank(mesh.rank)])


class Watched(PyTorchBackend):
    """Keeps the whole gradient of every parameter as the optimizer is given it, clipped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.grads: dict[str, Tensor] = {}
        self._optimizer.register_step_pre_hook(self._keep)

    def _keep(self, *_: Any) -> None:
        named = self._masters.named
        self.grads = {name: whole(master.grad).clone() for name, master in named.items() if master.grad is not None}


@dataclass(frozen=True)
class Trained:
    """What a job leaves: metrics and gradients of every step, the final weights, what share of them a rank holds."""

    metrics: list[Metrics]
    grads: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    logprobs: list[Tensor]
    reference: Tensor
    share: float


def train(job: Job, folder: Path, mesh: Mesh | None = None, **dtensor: Any) -> Trained:
    """Train for three steps, on this rank's part of the batch."""
    settings: dict[str, Any] = {
        "max_grad_norm": 0.1,
        "train_mb_tokens": job.max_tokens,
        "share_prefixes": job.share_prefixes,
        "generation": {"backend": "hf", "max_new_tokens": 8, "temperature": 0.8},
        "dtensor_cfg": dtensor,
    }
    config = policy_config(folder, **settings | job.settings)
    backend = Watched(config, str(folder), tokenizer(), with_reference=True, mesh=mesh)
    batch = job_batch(job)
    if mesh is not None:
        batch = own_part(batch, mesh)
    metrics, grads, logprobs = [], [], []
    for _ in range(3):
        logprobs.append(backend.logprobs(batch))
        metrics.append(backend.train(batch, OBJECTIVES[job.objective]))
        grads.append(backend.grads)
    with backend.reference():
        reference = backend.logprobs(batch)
    assert (logprobs[0] - reference).abs().max() < 1e-5
    parameters = list(backend.model.module.parameters())
    total = sum(p.numel() for p in tiny_model("llama", **MODEL).parameters())
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    weights = dict(backend.named_weights())
    return Trained(metrics, grads, weights, logprobs, reference, held / total)


def size_keys(sizes: ParallelSizes) -> dict[str, int]:
    """The keys of `dtensor_cfg` that ask for these sizes."""
    return {
        "tensor_parallel_size": sizes.tensor,
        "context_parallel_size": sizes.context,
        "pipeline_parallel_size": sizes.pipeline,
        "expert_parallel_size": sizes.expert,
        "data_parallel_replicate_size": sizes.replicate,
    }


def train_rank(
    rank: int, sizes: ParallelSizes, jobs: list[Job], folder: Path, dtensor: dict[str, Any]
) -> list[Trained]:
    """Train several jobs, one after the other, as one rank of a mesh."""
    del rank
    torch.use_deterministic_algorithms(True)
    mesh = Mesh(sizes, torch.device("cpu"))
    return [train(job, folder, mesh, **size_keys(sizes), **dtensor) for job in jobs]


def compare_all(
    jobs: list[Job], sizes: ParallelSizes, ranks: list[list[Trained]], alone: Callable[[Job], Trained]
) -> list[str]:
    """What differs in any of the jobs, of which every rank has trained all."""
    return [
        line
        for number, job in enumerate(jobs)
        for line in compare(job, sizes, [rank[number] for rank in ranks], alone(job))
    ]


def compare(job: Job, sizes: ParallelSizes, ranks: list[Trained], alone: Trained) -> list[str]:
    """What differs between a mesh and one process, in words; nothing if nothing does."""
    speaking = [trained for rank, trained in enumerate(ranks) if sizes.speaks(rank)]
    wrong: list[str] = []
    for step, expected in enumerate(alone.metrics):
        found, known = scalars(merge([trained.metrics[step] for trained in speaking])), scalars(expected)
        for name in ("loss", "grad_norm", "loss_tokens"):
            if abs(found[name] - known[name]) > 1e-4 * abs(known[name]) + 1e-7:
                wrong.append(f"{job}: {name} of step {step} is {found[name]}, not {known[name]}")
        if set().union(*(trained.grads[step] for trained in ranks)) != set(alone.grads[step]):
            wrong.append(f"{job}: some parameters have no gradient in step {step}")
        for rank, trained in enumerate(ranks):
            wrong += _differences(f"{job}: rank {rank}, gradient {step}", trained.grads[step], alone.grads[step])
    for rank, trained in enumerate(ranks):
        wrong += [f"{job}: rank {rank} streams other weights"] * (trained.weights.keys() != alone.weights.keys())
        wrong += _differences(f"{job}: rank {rank}, weight", trained.weights, alone.weights)
    return wrong


def _differences(what: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    if not found.keys() <= expected.keys():
        return [f"{what}: {sorted(found.keys() ^ expected.keys())} stand on one side alone"]
    scale = max(float(tensor.norm()) for tensor in expected.values())
    return [
        f"{what} {name}: {float((found[name] - tensor).norm()):.2e} of {float(tensor.norm()):.2e}"
        for name, tensor in expected.items()
        if name in found and float((found[name] - tensor).norm()) > 1e-4 * float(tensor.norm()) + 1e-6 * scale
    ]
