"""One ordered function that spreads a model over a mesh, from outside of it, and how a spread model is run.

Tensor parallelism first divides layers, then FSDP2 shards what is left of every layer over the ranks that have other
data (Zhao et al. 2023, https://arxiv.org/abs/2304.11277). Gradients are summed over those ranks, never averaged: a loss
is a part of that of the whole batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from nemo_rl.config.schema.dtensor import DTensorConfig
from nemo_rl.distributed.mesh import Mesh
from nemo_rl.errors import ConfigError
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.models.precision import Precision
from nemo_rl.models.scalar_model import ScalarModel
from nemo_rl.training.pytorch.experts import expert_modules, shard_experts
from nemo_rl.training.pytorch.pipeline import SPLITS_BACKWARD, Pipeline, keep_stages, tied_embedding
from nemo_rl.training.pytorch.spread import OverMesh
from nemo_rl.training.pytorch.tensor_parallel import apply_tensor_parallel, tensor_plan


@dataclass(frozen=True, slots=True)
class FullySharded:
    """How a model whose weights are sharded is run (see `nemo_rl.models.stream_model.Runner`).

    Attributes:
        root: the whole model.
        multiple: the tokens of a stream must be a multiple of it.
    """

    root: FSDPModule
    multiple: int = 1

    def run[T](self, function: Callable[[], T]) -> T:
        """Call a function with the weights outside of the layers gathered; without gradient, let go of them after."""
        try:
            return cast(Any, self.root).run(function)
        finally:
            if not torch.is_grad_enabled():
                self.root.reshard()


def parallelize[M: (CausalLM, ScalarModel)](
    model: M, mesh: Mesh, config: DTensorConfig, precision: Precision
) -> tuple[M, OverMesh]:
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
    tied = tied_embedding(model)
    if sizes.pipeline > 1:
        model = keep_stages(model, mesh.pipeline, config.pipeline_schedule, config.pipeline_stages_per_rank)
    shard_experts(module, mesh.expert)
    if sizes.tensor > 1:
        plan = tensor_plan(module, config.custom_parallel_plan)
        apply_tensor_parallel(model, mesh.tensor, plan, sequence_parallel=config.sequence_parallel)
    if sizes.pipeline < sizes.world_size:
        if sizes.pipeline > 1 and config.pipeline_schedule in SPLITS_BACKWARD:
            raise ConfigError(
                f"{config.pipeline_schedule} computes the gradients of weights apart, which sharded weights ({sizes}) "
                "do not follow; set policy.dtensor_cfg.pipeline_schedule to 1F1B or Interleaved1F1B"
            )
        cast_to = None if precision.weights == torch.float32 else precision.weights
        root = _shard(model, mesh, cast_to)
        model = replace(model, runner=FullySharded(root, sizes.tensor if config.sequence_parallel else 1))
    pipeline = None
    if sizes.pipeline > 1:
        pipeline = Pipeline(model, mesh.pipeline, config.pipeline_schedule, config.pipeline_stages_per_rank, precision)
    return model, OverMesh(mesh, pipeline, tied)


def _shard(model: CausalLM | ScalarModel, mesh: Mesh, param_dtype: torch.dtype | None) -> FSDPModule:
    """Shard every layer on its own, and the rest of the model together, which stays gathered until the backward pass."""
    reduce_dtype = None if param_dtype is None else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    settings: Mapping[str, Any] = {"mesh": mesh.weights, "mp_policy": policy}
    if mesh.sizes.expert > 1:  # the ranks that divide experts hold none of each other's
        for _, experts in expert_modules(model.module):
            fully_shard(experts, mesh=mesh.expert_weights, mp_policy=policy)
    for layer in cast(nn.ModuleList, model.trunk.layers):
        if any(True for _ in layer.parameters()):  # not what another stage holds
            fully_shard(layer, **settings)
    module = model.module
    module.run = MethodType(_call, module)  # pyright: ignore[reportAttributeAccessIssue]
    root = fully_shard(module, **settings, reshard_after_forward=False)
    register_fsdp_forward_method(module, "run")
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    return root


def _call(_: nn.Module, function: Callable[[], Any]) -> Any:
    return function()
