"""Section `policy.dtensor_cfg`: over which ranks PyTorch spreads a model."""

from typing import Literal

from nemo_rl.config.schema.base import PositiveInt, Section


class DTensorConfig(Section):
    """How a model is spread over the ranks of `cluster`; those that no size takes share data and weights (FSDP2)."""

    tensor_parallel_size: PositiveInt = 1
    """Ranks that divide every layer among them."""

    sequence_parallel: bool = False
    """Divide among the tensor-parallel ranks also what lies between the divided layers: norms and residual stream."""

    context_parallel_size: PositiveInt = 1
    """Ranks that divide the tokens of every sequence among them."""

    context_parallel_kind: Literal["allgather", "ulysses"] = "allgather"
    """How a context-parallel rank comes to the keys of the others: `allgather` collects them, `ulysses` exchanges
    heads for tokens, which takes less memory and needs as many key heads as ranks."""

    pipeline_parallel_size: PositiveInt = 1
    """Ranks that hold different layers."""

    expert_parallel_size: PositiveInt = 1
    """Ranks that divide the experts of a layer among them, out of those that share its weights."""

    data_parallel_replicate_size: PositiveInt = 1
    """Copies of the sharded weights (HSDP); gradients are summed over the copies."""

    custom_parallel_plan: str | dict[str, str] | None = None
    """Which layers tensor parallelism divides and how: names with `*` for numbers, such as
    `model.layers.*.self_attn.q_proj: colwise`, or the import path of such a mapping or of a function of the model that
    makes one; None takes the plan of the model's own code."""
