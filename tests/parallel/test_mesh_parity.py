"""The parity matrix: a mesh trains what one process trains, whatever the layout, the objective and the micro-batches.

Every rank has data of its own; three optimizer steps with clipping. Losses, the gradient of every parameter and the
updated weights are those of one process in float32, and something is really sharded. The chosen meshes run always; the
`nightly` marker adds every legal combination of sizes up to eight ranks.
"""

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.distributed.mesh import ParallelSizes
from ranks import run_ranks
from tiny_mesh import MODEL, Job, Trained, compare_all, train, train_rank
from tiny_models import tiny_model

JOBS = [
    Job("sft", share_prefixes=False, max_tokens=1),
    Job("sft", share_prefixes=True, max_tokens=1024),
    Job("grpo", share_prefixes=False, max_tokens=80),
    Job("grpo", share_prefixes=True, max_tokens=64),
    Job("dpo", share_prefixes=False, max_tokens=80),
    Job("dpo", share_prefixes=True, max_tokens=1024),
]
"""Each objective plain (one sequence or pair at a time), packed or as a prefix tree, in one micro-batch or several."""

EVERY_JOB = [
    Job(objective, share_prefixes=shares, max_tokens=tokens)
    for objective, shares, tokens in product(("sft", "grpo", "dpo"), (False, True), (1, 64, 80, 1024))
    if objective != "dpo" or tokens >= 80  # which holds a pair
]

TWO = {"pipeline_stages_per_rank": 2}
SP = {"sequence_parallel": True}
MESHES: dict[str, tuple[ParallelSizes, dict[str, Any], float]] = {
    "fsdp2": (ParallelSizes(shard=2), {}, 0.51),
    "hsdp": (ParallelSizes(replicate=2, shard=2), {}, 0.51),
    "tp": (ParallelSizes(tensor=2), {}, 0.55),
    "tp-sp": (ParallelSizes(tensor=2), SP, 0.55),
    "tp-custom": (ParallelSizes(tensor=2), {"custom_parallel_plan": "tiny_mesh:feed_forward_plan"}, 0.8),
    "cp": (ParallelSizes(context=2), {}, 0.51),
    "cp-ulysses": (ParallelSizes(context=2), {"context_parallel_kind": "ulysses"}, 0.51),
    "pp-gpipe": (ParallelSizes(pipeline=2), {"pipeline_schedule": "GPipe"}, 0.6),
    "pp-1f1b": (ParallelSizes(pipeline=2), {}, 0.6),
    "pp-interleaved": (ParallelSizes(pipeline=2), {"pipeline_schedule": "Interleaved1F1B", **TWO}, 0.6),
    "pp-looped": (ParallelSizes(pipeline=2), {"pipeline_schedule": "LoopedBFS", **TWO}, 0.6),
    "pp-zero-bubble": (ParallelSizes(pipeline=2), {"pipeline_schedule": "InterleavedZeroBubble", **TWO}, 0.6),
    "pp-zbv": (ParallelSizes(pipeline=2, folded=True), {"pipeline_schedule": "ZBVZeroBubble", **TWO}, 0.8),
    "fsdp2-tp-sp": (ParallelSizes(shard=2, tensor=2), SP, 0.3),
    "fsdp2-cp": (ParallelSizes(shard=2, context=2), {}, 0.26),
    "cp-tp-sp": (ParallelSizes(context=2, tensor=2), SP, 0.3),
    "pp-fsdp2": (ParallelSizes(pipeline=2, shard=2), {}, 0.3),
    "pp-cp": (ParallelSizes(pipeline=2, context=2), {}, 0.3),
    "pp-tp-sp": (ParallelSizes(pipeline=2, tensor=2), SP, 0.35),
}
"""Sizes, settings of `dtensor_cfg`, and the largest share of the weights that a rank may hold."""

EVERY_MESH = [
    ParallelSizes(pipeline, replicate, shard, context, tensor)
    for pipeline, replicate, shard, context, tensor in product((1, 2, 4), (1, 2), (1, 2, 4, 8), (1, 2, 4), (1, 2))
    if 1 < pipeline * replicate * shard * context * tensor <= 8
]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity") / "llama"
    tiny_model("llama", **MODEL).save_pretrained(path)
    return path


@cache
def alone(job: str, folder: Path) -> Trained:
    return train(next(known for known in EVERY_JOB if str(known) == job), folder)


def differences(sizes: ParallelSizes, settings: dict[str, Any], jobs: list[Job], folder: Path, share: float) -> str:
    ranks = run_ranks(train_rank, sizes.world_size, sizes, jobs, folder, settings, timeout=600)
    wrong = compare_all(jobs, sizes, ranks, lambda job: alone(str(job), folder))
    held = max(trained.share for rank in ranks for trained in rank)
    wrong += [f"a rank holds {held:.2f} of the weights"] * (held > share)
    return "\n".join(wrong[:20])


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_trains_what_one_process_trains(name: str, llama: Path) -> None:
    sizes, settings, largest_share = MESHES[name]
    assert not differences(sizes, settings, JOBS, llama, largest_share)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sizes", EVERY_MESH, ids=str)
def test_every_mesh_trains_what_one_process_trains(sizes: ParallelSizes, llama: Path) -> None:
    parts = sizes.pipeline * sizes.shard * sizes.context * sizes.tensor
    settings = SP if sizes.tensor > 1 else {}
    share = 1 / parts + (0.15 if sizes.pipeline > 1 else 0.06)
    assert not differences(sizes, settings, EVERY_JOB, llama, share)
