"""The ranks of a trained model: how many and on which mesh, from the configuration, and how they are started."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from nemo_rl.config.model_shapes import model_shape
from nemo_rl.config.schema.cluster import ClusterConfig
from nemo_rl.config.schema.policy import TrainedPolicyConfig
from nemo_rl.data.assignment import assign
from nemo_rl.data.cost import ComputeCost
from nemo_rl.distributed.mesh import ParallelSizes, meeting
from nemo_rl.errors import ConfigError
from nemo_rl.interfaces import Executor, Resources
from nemo_rl.workers.ranked import Deal, RankedWorker


def parallel_sizes(model: TrainedPolicyConfig, cluster: ClusterConfig, *, section: str = "policy") -> ParallelSizes:
    """How a model, configured in `section`, is spread over the ranks of the cluster.

    Raises:
        ConfigError: the sizes do not divide the ranks.
    """
    spread = model.dtensor_cfg
    try:
        return ParallelSizes.filling(
            cluster.num_ranks,
            pipeline=spread.pipeline_parallel_size,
            replicate=spread.data_parallel_replicate_size,
            context=spread.context_parallel_size,
            tensor=spread.tensor_parallel_size,
            expert=spread.expert_parallel_size,
            folded=spread.pipeline_parallel_size > 1 and spread.pipeline_schedule == "ZBVZeroBubble",
        )
    except ConfigError as error:
        where = "ranks_per_node" if cluster.ranks_per_node else "gpus_per_node"
        raise ConfigError(f"{section}.dtensor_cfg, cluster.num_nodes and cluster.{where} do not fit: {error}") from None


def check_places(model: TrainedPolicyConfig, cluster: ClusterConfig, *, section: str) -> None:
    """Refuse ranks for which there is no place.

    Raises:
        ConfigError: with what to set instead.
    """
    sizes = parallel_sizes(model, cluster, section=section)
    if sizes.world_size == 1:
        return
    if cluster.executor == "local" and cluster.num_nodes > 1:
        raise ConfigError(
            f"cluster.num_nodes is {cluster.num_nodes} and cluster.executor is local, which starts processes on this "
            "machine alone; set cluster.executor=ray"
        )
    if cluster.gpus_per_node and cluster.ranks_on_a_node > cluster.gpus_per_node:
        raise ConfigError(
            f"cluster.ranks_per_node is {cluster.ranks_per_node} and cluster.gpus_per_node is "
            f"{cluster.gpus_per_node}, and each rank takes a GPU; leave the first out, or lower it"
        )
    if cluster.executor == "local" and model.device != "cpu" and torch.cuda.is_available():
        there = torch.cuda.device_count()
        if cluster.ranks_on_a_node > there:
            raise ConfigError(
                f"cluster asks for {cluster.ranks_on_a_node} ranks and torch finds {there} GPU(s) here, one for each "
                f"rank; lower cluster.gpus_per_node and cluster.ranks_per_node, or set {section}.device=cpu"
            )


def dealer(model: TrainedPolicyConfig) -> Deal:
    """What makes the data ranks of a model compute about equally long."""
    shape = model_shape(model.model_name)
    return partial(
        assign,
        cost=ComputeCost() if shape is None else ComputeCost.of_model(shape),
        share_prefixes=model.share_prefixes,
        min_shared=model.min_shared_prefix,
    )


def start_ranks(
    executor: Executor,
    stack: ExitStack,
    kind: Callable[..., Any],
    arguments: Mapping[str, object],
    *,
    sizes: ParallelSizes,
    deal: Deal,
    resources: Resources,
) -> RankedWorker:
    """Start one worker per rank, which meet while they are built; they end with the stack.

    Args:
        executor: starts them.
        stack: keeps the meeting open as long as they live.
        kind: of worker; takes its `place`.
        arguments: besides, the same for each rank.
        sizes: of their mesh.
        deal: chooses the sequences of each data rank.
        resources: of each rank.

    Raises:
        NemoRLError: what a rank failed with.
    """
    places = stack.enter_context(meeting(sizes, executor.host_address()))
    ranks = executor.start_group(kind, [{**arguments, "place": place} for place in places], resources)
    worker = RankedWorker(ranks, sizes, deal=deal, name=kind.__name__)
    stack.callback(worker.stop)  # before the meeting is closed
    return worker
