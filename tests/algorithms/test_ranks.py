"""How many ranks a model has and what they divide, from the configuration alone."""

import pytest
import torch

from nemo_rl.algorithms.ranks import check_places, parallel_sizes
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.distributed.mesh import ParallelSizes
from nemo_rl.errors import ConfigError


def load(*settings: str) -> GRPOConfig:
    return load_config(None, settings, GRPOConfig).config


def sizes(*settings: str) -> ParallelSizes:
    config = load(*settings)
    return parallel_sizes(config.policy, config.cluster)


def refusal(*settings: str) -> str:
    config = load(*settings)
    with pytest.raises(ConfigError) as caught:
        check_places(config.policy, config.cluster, section="policy")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def spread(**sizes: int) -> str:
    return f"policy.dtensor_cfg={{{', '.join(f'{name}: {size}' for name, size in sizes.items())}}}"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], ParallelSizes()),
        (["cluster.gpus_per_node=1"], ParallelSizes()),
        (["cluster.ranks_per_node=2"], ParallelSizes(shard=2)),
        (["cluster.gpus_per_node=8", "cluster.num_nodes=2"], ParallelSizes(shard=16)),
        (["cluster.gpus_per_node=8", "cluster.ranks_per_node=4"], ParallelSizes(shard=4)),
        (
            ["cluster.ranks_per_node=8", spread(tensor_parallel_size=2, context_parallel_size=2)],
            ParallelSizes(shard=2, context=2, tensor=2),
        ),
        (
            ["cluster.ranks_per_node=8", spread(pipeline_parallel_size=2, data_parallel_replicate_size=2)],
            ParallelSizes(pipeline=2, replicate=2, shard=2),
        ),
        (["cluster.ranks_per_node=4", spread(expert_parallel_size=4)], ParallelSizes(shard=4, expert=4)),
    ],
)
def test_the_ranks_that_no_size_takes_share_the_data(settings: list[str], expected: ParallelSizes) -> None:
    assert sizes(*settings) == expected


def test_sizes_that_do_not_divide_the_ranks_name_the_keys() -> None:
    message = refusal("cluster.ranks_per_node=6", spread(tensor_parallel_size=4))
    assert message.startswith("policy.dtensor_cfg, cluster.num_nodes and cluster.ranks_per_node do not fit: 6 rank(s) ")
    assert "tensor 4 = 4" in message
    message = refusal("cluster.gpus_per_node=4", spread(expert_parallel_size=3))
    assert "cluster.gpus_per_node do not fit: expert_parallel_size 3 does not divide" in message


def test_ranks_have_a_place_each() -> None:
    assert "set cluster.executor=ray" in refusal("cluster.num_nodes=2")
    message = refusal("cluster.ranks_per_node=4", "cluster.gpus_per_node=2")
    assert "cluster.ranks_per_node is 4 and cluster.gpus_per_node is 2" in message
    config = load("cluster.num_nodes=2", "cluster.ranks_per_node=2", "cluster.executor=ray")
    check_places(config.policy, config.cluster, section="policy")
    config = load("cluster.ranks_per_node=2", "policy.device=cpu")
    check_places(config.policy, config.cluster, section="policy")


def test_on_this_machine_each_rank_takes_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "asks for 3 ranks and torch finds 2 GPU(s)" in refusal("cluster.ranks_per_node=3")
    assert "asks for 4 ranks and torch finds 2 GPU(s)" in refusal("cluster.gpus_per_node=4")
    for fine in (["cluster.gpus_per_node=2"], ["cluster.ranks_per_node=3", "policy.device=cpu"]):
        config = load(*fine)
        check_places(config.policy, config.cluster, section="policy")


def test_sequence_parallelism_needs_tensor_parallel_ranks() -> None:
    with pytest.raises(ConfigError, match="sequence_parallel divides tokens among tensor-parallel ranks"):
        load("policy.dtensor_cfg.sequence_parallel=true")
    load("policy.dtensor_cfg={tensor_parallel_size: 2, sequence_parallel: true}")


@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble"])
def test_activations_are_not_computed_a_third_time(schedule: str) -> None:
    stages = f"pipeline_parallel_size: 2, pipeline_stages_per_rank: 2, pipeline_schedule: {schedule}"
    with pytest.raises(ConfigError, match="activations would be computed a third time"):
        load(f"policy.dtensor_cfg={{{stages}, activation_checkpointing: selective}}")
    load(f"policy.dtensor_cfg={{{stages}}}")


def test_a_balance_loss_is_not_lost_where_layers_are_computed_again() -> None:
    balance, again = "policy.moe.balance_coefficient=0.01", "policy.dtensor_cfg.activation_checkpointing=true"
    with pytest.raises(ConfigError, match="which computing them again would miss"):
        load(balance, again)
    load(again, "policy.moe.bias_update_rate=0.01")
