"""The parity matrix: a mesh trains what one process trains, whatever the layout, the objective and the micro-batches.

Every rank has data of its own; three optimizer steps with clipping. Losses, the gradient of every parameter and the
updated weights are those of one process in float32, and something is really sharded.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.distributed.mesh import ParallelSizes
from ranks import run_ranks
from tiny_mesh import MODEL, Job, Trained, compare, train, train_rank
from tiny_models import tiny_model

JOBS = [
    Job("sft", share_prefixes=False, max_tokens=24),
    Job("grpo", share_prefixes=True, max_tokens=64),
    Job("dpo", share_prefixes=False, max_tokens=80),
]
"""Plain rows, a shared prefix tree, packed pairs: several micro-batches on every rank in each."""

MESHES: dict[str, tuple[ParallelSizes, dict[str, Any], float]] = {
    "fsdp2": (ParallelSizes(shard=2), {}, 0.51),
    "hsdp": (ParallelSizes(replicate=2, shard=2), {}, 0.51),
    "tp": (ParallelSizes(tensor=2), {}, 0.55),
    "tp-sp": (ParallelSizes(tensor=2), {"sequence_parallel": True}, 0.55),
    "cp": (ParallelSizes(context=2), {}, 0.51),
    "cp-ulysses": (ParallelSizes(context=2), {"context_parallel_kind": "ulysses"}, 0.51),
    "cp-tp-sp": (ParallelSizes(context=2, tensor=2), {"sequence_parallel": True}, 0.3),
    "fsdp2-cp": (ParallelSizes(shard=2, context=2), {}, 0.26),
    "pp-cp": (ParallelSizes(pipeline=2, context=2), {}, 0.3),
    "pp-tp-sp": (ParallelSizes(pipeline=2, tensor=2), {"sequence_parallel": True}, 0.35),
    "pp": (ParallelSizes(pipeline=2), {}, 0.6),
    "pp-gpipe": (ParallelSizes(pipeline=2), {"pipeline_schedule": "GPipe"}, 0.6),
    "pp-interleaved": (
        ParallelSizes(pipeline=2),
        {"pipeline_schedule": "Interleaved1F1B", "pipeline_stages_per_rank": 2},
        0.6,
    ),
    "pp-zero-bubble": (
        ParallelSizes(pipeline=2),
        {"pipeline_schedule": "InterleavedZeroBubble", "pipeline_stages_per_rank": 2},
        0.6,
    ),
    "pp-zbv": (
        ParallelSizes(pipeline=2, folded=True),
        {"pipeline_schedule": "ZBVZeroBubble", "pipeline_stages_per_rank": 2},
        0.8,
    ),
    "pp-fsdp2": (ParallelSizes(pipeline=2, shard=2), {}, 0.3),
    "fsdp2-tp-sp": (ParallelSizes(shard=2, tensor=2), {"sequence_parallel": True}, 0.3),
}
"""Sizes, settings of `dtensor_cfg`, and the largest share of the weights that a rank may hold."""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity") / "llama"
    tiny_model("llama", **MODEL).save_pretrained(path)
    return path


@cache
def alone(job: str, folder: Path) -> Trained:
    return train(next(known for known in JOBS if str(known) == job), folder)


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_trains_what_one_process_trains(name: str, llama: Path) -> None:
    sizes, settings, largest_share = MESHES[name]
    ranks = run_ranks(train_rank, sizes.world_size, sizes, JOBS, llama, settings)
    wrong = [
        line
        for number, job in enumerate(JOBS)
        for line in compare(job, sizes, [rank[number] for rank in ranks], alone(str(job), llama))
    ]
    assert not wrong, "\n".join(wrong[:20])
    assert all(trained.share <= largest_share for rank in ranks for trained in rank)
