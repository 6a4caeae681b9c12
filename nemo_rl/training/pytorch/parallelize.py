"""One ordered function that spreads a model over a mesh, from outside of it, and how a spread model is run.

Tensor parallelism first divides layers, then FSDP2 shards what is left of every layer over the ranks that have other
data (Zhao et al. 2023, https://arxiv.org/abs/2304.11277). Gradients are summed over those ranks, never averaged: a loss
is a part of that of the whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from nemo_rl.config.schema.dtensor import ContextKind, DTensorConfig
from nemo_rl.data.packing import Stream
from nemo_rl.data.padding import pad_stream
from nemo_rl.data.stream_split import split_stream
from nemo_rl.distributed.mesh import Mesh
from nemo_rl.distributed.vocabulary import ShardedVocabulary
from nemo_rl.errors import ConfigError
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.models.hidden import Hidden, WholeHidden
from nemo_rl.models.precision import Precision
from nemo_rl.models.scalar_model import ScalarModel
from nemo_rl.models.stream_model import StreamModel
from nemo_rl.training.pytorch.context import GatheredContext, SplitHidden, UlyssesContext, key_head_repeats
from nemo_rl.training.pytorch.experts import expert_modules, shard_experts
from nemo_rl.training.pytorch.pipeline import Pipeline, keep_stages, tied_embedding
from nemo_rl.training.pytorch.spread import OverMesh
from nemo_rl.training.pytorch.tensor_parallel import apply_tensor_parallel, tensor_plan


@dataclass(frozen=True, slots=True)
class FullySharded:
    """How a model whose weights are sharded is run (see `nemo_rl.models.stream_model.Runner`).

    Attributes:
        root: the whole model.
        device: where it is computed, wherever the shards rest.
        divided: ranks that divide the tokens between the layers of a tensor-parallel model.
        context: the ranks that divide the tokens throughout.
        context_kind: how they come to each other's keys.
    """

    root: FSDPModule
    device: torch.device
    divided: int
    context: dist.ProcessGroup
    context_kind: ContextKind

    @property
    def copies(self) -> int:
        return self.context.size()

    @property
    def parts(self) -> int:
        return self.divided * self.copies

    def run[T](self, function: Callable[[], T]) -> T:
        """Call a function with the weights outside of the layers gathered; without gradient, let go of them after."""
        try:
            return cast(Any, self.root).run(function)
        finally:
            if not torch.is_grad_enabled():
                self.root.reshard()

    def read(self, model: StreamModel, stream: Stream, received: Tensor | None) -> Hidden:
        """Run the trunk over this rank's part of the tokens."""
        if self.copies == 1:
            return WholeHidden(model.stream_hidden(pad_stream(stream, self.divided), received))
        split = split_stream(stream, self.copies, multiple=self.divided)
        part, device = split.part(self.context.rank()), model.device
        kind = GatheredContext if self.context_kind == "allgather" else UlyssesContext
        plan = kind(split, self.context, device)
        states = model.hidden(part.input_ids.to(device), part.position_ids.to(device), plan, received)
        return SplitHidden(states, split, self.context)


def parallelize(
    model: CausalLM | ScalarModel, mesh: Mesh, config: DTensorConfig, precision: Precision
) -> tuple[CausalLM | ScalarModel, OverMesh]:
    """Spread a model over the ranks of a mesh, all of which call this with the same weights.

    Args:
        model: loaded whole, in the dtype that is trained.
        mesh: the ranks.
        config: section `policy.dtensor_cfg`.
        precision: what the weights are cast to where they are computed with.

    Returns:
        The model to use from now on, and where its weights are.

    Raises:
        ConfigError: the model cannot be divided that way.
    """
    sizes, module = mesh.sizes, model.module
    tied, num_parameters = tied_embedding(model), model.num_parameters
    plan = tensor_plan(module, config.custom_parallel_plan) if sizes.tensor > 1 else {}
    if sizes.pipeline > 1:
        model = keep_stages(model, mesh.pipeline, config.pipeline_schedule, config.pipeline_stages_per_rank)
    shard_experts(module, mesh.expert)
    if sizes.tensor > 1:
        apply_tensor_parallel(model, mesh.tensor, plan, sequence_parallel=config.sequence_parallel)
        if isinstance(model, CausalLM) and isinstance(model.head.weight, DTensor):
            group, total = mesh.tensor.get_group(), len(model.head.weight)
            model = replace(model, vocabulary=ShardedVocabulary(group, total))
    if sizes.context > 1:
        _check_context(model, mesh, config)
    if is_sharded(mesh, config):
        if sizes.pipeline > 1 and config.splits_backward:
            raise ConfigError(
                f"{config.pipeline_schedule} computes the gradients of weights apart, which sharded weights ({sizes}) "
                "do not follow; set policy.dtensor_cfg.pipeline_schedule to 1F1B or Interleaved1F1B"
            )
        cast_to = None if precision.weights == torch.float32 else precision.weights
        root = _shard(model, mesh, cast_to, offload=config.cpu_offload)
        divided = sizes.tensor if config.sequence_parallel else 1
        runner = FullySharded(root, mesh.device, divided, mesh.context.get_group(), config.context_parallel_kind)
        model = replace(model, runner=runner)
    pipeline = None
    if sizes.pipeline > 1:
        pipeline = Pipeline(model, mesh.pipeline, config.pipeline_schedule, config.pipeline_stages_per_rank, precision)
    return model, OverMesh(mesh, pipeline, tied, num_parameters)


def is_sharded(mesh: Mesh, config: DTensorConfig) -> bool:
    """Whether FSDP holds the weights, perhaps for one rank that keeps them on the CPU; if so they are float32."""
    return mesh.sizes.pipeline < mesh.sizes.world_size or config.cpu_offload


def _check_context(model: StreamModel, mesh: Mesh, config: DTensorConfig) -> None:
    if not model.takes_plans:
        raise ConfigError(
            f"the tokens of {type(model.module).__name__} are mixed by more than attention, so ranks cannot divide "
            "them; set policy.dtensor_cfg.context_parallel_size to 1"
        )
    if config.context_parallel_kind == "ulysses":
        text = model.module.config.get_text_config()
        heads, key_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", text.num_attention_heads)
        key_head_repeats(heads // mesh.sizes.tensor, key_heads // mesh.sizes.tensor, mesh.sizes.context)


def _shard(model: CausalLM | ScalarModel, mesh: Mesh, param_dtype: torch.dtype | None, *, offload: bool) -> FSDPModule:
    """Shard every layer on its own, and the rest of the model together, which stays gathered until the end."""
    reduce_dtype = None if param_dtype is None else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    common: dict[str, Any] = {"mp_policy": policy}
    if offload:
        common["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda")
    if mesh.sizes.expert > 1:  # the ranks that divide experts hold none of each other's
        for _, experts in expert_modules(model.module):
            fully_shard(experts, mesh=mesh.expert_weights, **common)
    settings: dict[str, Any] = {"mesh": mesh.weights, **common}
    for layer in cast(nn.ModuleList, model.trunk.layers):
        if any(True for _ in layer.parameters()):  # not what another stage holds
            fully_shard(layer, **settings)
    module = model.module
    module.__dict__["run"] = MethodType(_call, module)
    root = fully_shard(module, **settings, reshard_after_forward=False)
    register_fsdp_forward_method(module, "run")
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    return root


def _call(_: nn.Module, function: Callable[[], Any]) -> Any:
    return function()
