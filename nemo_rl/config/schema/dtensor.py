"""Section `policy.dtensor_cfg`: over which ranks PyTorch spreads a model, and which part of it is trained."""

from typing import Literal, Self

from pydantic import model_validator

from nemo_rl.config.schema.base import PositiveInt, Section, conflict
from nemo_rl.config.schema.lora import LoRAConfig

type ContextKind = Literal["allgather", "ulysses"]


class DTensorConfig(Section):
    """How a model is spread over the ranks of `cluster`; those that no size takes share data and weights (FSDP2)."""

    tensor_parallel_size: PositiveInt = 1
    """Ranks that divide every layer among them."""

    sequence_parallel: bool = False
    """Divide among the tensor-parallel ranks also what lies between the divided layers: norms and residual stream."""

    context_parallel_size: PositiveInt = 1
    """Ranks that divide the tokens of every sequence among them."""

    context_parallel_kind: ContextKind = "allgather"
    """How a context-parallel rank comes to the keys of the others: `allgather` collects them, `ulysses` exchanges
    heads for tokens, which takes less memory and needs as many key heads as ranks."""

    pipeline_parallel_size: PositiveInt = 1
    """Ranks that hold different layers."""

    pipeline_schedule: Literal[
        "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble"
    ] = "1F1B"
    """In which order micro-batches run through the stages, by PyTorch's name."""

    pipeline_stages_per_rank: PositiveInt = 1
    """Stages of a rank: 1 for `GPipe` and `1F1B`, 2 for `ZBVZeroBubble`, 2 or more for the others."""

    expert_parallel_size: PositiveInt = 1
    """Ranks that divide the experts of a layer among them, out of those that share its weights."""

    data_parallel_replicate_size: PositiveInt = 1
    """Copies of the sharded weights (HSDP); gradients are summed over the copies."""

    custom_parallel_plan: str | dict[str, str] | None = None
    """Which layers tensor parallelism divides and how: names with `*` for numbers, such as
    `model.layers.*.self_attn.q_proj: colwise`, or the import path of such a mapping or of a function of the model that
    makes one; None takes the plan of the model's own code."""

    lora_cfg: LoRAConfig = LoRAConfig()
    """Adapters of low rank that are trained instead of the weights."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise conflict(
                "sequence_parallel divides tokens among tensor-parallel ranks: raise tensor_parallel_size or set it to"
                " false",
                "sequence_parallel",
            )
        sizes = {
            "tensor_parallel_size": self.tensor_parallel_size,
            "pipeline_parallel_size": self.pipeline_parallel_size,
        }
        if self.lora_cfg.enabled and (name := next((name for name, size in sizes.items() if size > 1), None)):
            raise conflict(
                f"adapters are neither divided nor staged: set {name} to 1 (all ranks then share data and weights) or"
                " lora_cfg.enabled to false",
                name,
                "lora_cfg.enabled",
            )
        single, per_rank = self.pipeline_schedule in ("GPipe", "1F1B"), self.pipeline_stages_per_rank
        if self.pipeline_parallel_size > 1 and (single != (per_rank == 1)):
            raise conflict(
                f"{self.pipeline_schedule} runs {'one stage' if single else 'two or more stages'} a rank, not"
                f" {per_rank}: change pipeline_stages_per_rank or pipeline_schedule",
                "pipeline_stages_per_rank",
            )
        return self
