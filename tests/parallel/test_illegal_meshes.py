"""What a model cannot be divided into is refused with the rule that it breaks; a failure of one rank is one of all."""

from pathlib import Path
from typing import Any

import torch

from nemo_rl.distributed.mesh import Mesh, ParallelSizes
from nemo_rl.errors import BackendError, ConfigError
from nemo_rl.training.pytorch.backend import PyTorchBackend
from ranks import run_ranks
from tiny_batches import rollout_batch
from tiny_mesh import OBJECTIVES, own_part, policy_config, size_keys, tokenizer
from tiny_models import tiny_model

CASES: list[tuple[str, ParallelSizes, dict[str, Any], str]] = [
    ("llama", ParallelSizes(tensor=4), {}, "tensor_parallel_size 4 does not divide the model's num_key_value_heads 2"),
    ("llama", ParallelSizes(pipeline=4), {}, "2 layers do not fill 4 pipeline stages"),
    ("gemma2", ParallelSizes(pipeline=2, shard=2), {}, "the trunk of gemma2 cannot be divided into stages"),
    (
        "llama",
        ParallelSizes(pipeline=2, shard=2),
        {"pipeline_schedule": "ZBVZeroBubble", "pipeline_stages_per_rank": 2},
        "2 layers do not fill 4 pipeline stages",
    ),
    ("mamba", ParallelSizes(context=4), {}, "are mixed by more than attention, so ranks cannot divide"),
    ("mamba", ParallelSizes(tensor=2, shard=2), {}, "has no plan for tensor parallelism"),
    (
        "llama",
        ParallelSizes(tensor=2, shard=2),
        {"custom_parallel_plan": {"model.layers.*.self_attn.q_proj": "diagonal"}},
        "the style 'diagonal'; known are colwise, rowwise",
    ),
    ("qwen3_next", ParallelSizes(tensor=2, shard=2), {"sequence_parallel": True}, "runs on padded rows, whose length"),
    (
        "llama",
        ParallelSizes(tensor=2, shard=2),
        {"custom_parallel_plan": {"nowhere.*": "colwise"}},
        "custom_parallel_plan names 'nowhere.*', and LlamaForCausalLM has no such module",
    ),
]


def refusals(rank: int, folder: Path) -> list[str]:
    del rank
    found = []
    for family, sizes, settings, _ in CASES:
        config = policy_config(folder / family, dtensor_cfg={**size_keys(sizes), **settings})
        try:
            PyTorchBackend(config, str(folder / family), tokenizer(), mesh=Mesh(sizes, torch.device("cpu")))
            found.append("taken")
        except ConfigError as error:
            found.append(str(error))
    return found


def failure(rank: int, folder: Path) -> str:
    sizes = ParallelSizes(shard=2)
    config = policy_config(folder)
    mesh = Mesh(sizes, torch.device("cpu"))
    backend = PyTorchBackend(config, str(folder), tokenizer(), mesh=mesh)
    batch = own_part(rollout_batch(tiny_model("llama")), mesh)
    before = {name: weight.clone() for name, weight in backend.named_weights()}
    if rank == 1:
        batch = batch.with_columns(advantages=batch.token_columns["advantages"] * torch.nan)
    try:
        backend.train(batch, OBJECTIVES["grpo"])
    except BackendError as error:
        for name, weight in backend.named_weights():
            assert torch.equal(weight, before[name]), name
        return str(error)
    return "nothing"


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_of_them(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    first, second = run_ranks(failure, 2, tmp_path)
    assert first.startswith("the loss of another rank is not finite") and second.startswith("the loss is nan")


def test_the_broken_rule_is_named(tmp_path: Path) -> None:
    for family in {case[0] for case in CASES}:
        tiny_model(family).save_pretrained(tmp_path / family)
    for found in run_ranks(refusals, 4, tmp_path):
        for (*_, expected), said in zip(CASES, found, strict=True):
            assert expected in said, said
