"""The parity matrix with a mixture of experts: divided experts train what one process trains."""

from functools import cache
from pathlib import Path

import pytest

from nemo_rl.distributed.mesh import ParallelSizes
from ranks import run_ranks
from tiny_mesh import Job, Trained, compare_all, train, train_rank
from tiny_models import tiny_model

JOBS = [
    Job("sft", share_prefixes=False, max_tokens=1024, settings={"moe": {"balance_coefficient": 0.1}}),
    Job("grpo", share_prefixes=True, max_tokens=1025),
]
MESHES = {
    "ep": ParallelSizes(shard=2, expert=2),
    "ep-fsdp2": ParallelSizes(shard=4, expert=2),
    "ep-hsdp": ParallelSizes(replicate=2, shard=2, expert=2),
    "pp-ep": ParallelSizes(pipeline=2, shard=2, expert=2),
    "ep-tp": ParallelSizes(shard=2, tensor=2, expert=2),
}


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity") / "qwen3_moe"
    tiny_model("qwen3_moe", mlp_only_layers=[]).save_pretrained(path)
    return path


@cache
def alone(job: str, folder: Path) -> Trained:
    return train(next(known for known in JOBS if str(known) == job), folder)


@pytest.mark.parametrize("name", MESHES)
def test_divided_experts_train_what_one_process_trains(name: str, mixture: Path) -> None:
    sizes = MESHES[name]
    ranks = run_ranks(train_rank, sizes.world_size, sizes, JOBS, mixture, {})
    wrong = compare_all(JOBS, sizes, ranks, lambda job: alone(str(job), mixture))
    assert not wrong, "\n".join(wrong[:20])
    assert all(trained.share <= 1.02 / sizes.shard for rank in ranks for trained in rank)
