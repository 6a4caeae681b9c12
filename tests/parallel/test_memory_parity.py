"""What saves memory changes no number: training is bit for bit the same, in one process and on meshes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rl.distributed.mesh import Mesh, ParallelSizes
from ranks import run_ranks
from tiny_mesh import MODEL, Job, Trained, size_keys, train
from tiny_models import tiny_model

JOBS = [Job("grpo", share_prefixes=True, max_tokens=64), Job("sft", share_prefixes=False, max_tokens=24)]
RECOMPUTED: list[dict[str, Any]] = [{"activation_checkpointing": kind} for kind in (True, "selective")]
OFFLOADED: list[dict[str, Any]] = [{"cpu_offload": True}, {"cpu_offload": True, "activation_checkpointing": True}]

MESHES: dict[str, tuple[ParallelSizes, dict[str, Any], list[dict[str, Any]]]] = {
    "fsdp2": (ParallelSizes(shard=2), {}, RECOMPUTED + OFFLOADED),
    "hsdp": (ParallelSizes(replicate=2, shard=2), {}, OFFLOADED[:1]),
    "tp-sp": (ParallelSizes(tensor=2), {"sequence_parallel": True}, RECOMPUTED + OFFLOADED[:1]),
    "cp": (ParallelSizes(context=2), {}, RECOMPUTED),
    "cp-ulysses": (ParallelSizes(context=2), {"context_parallel_kind": "ulysses"}, RECOMPUTED),
    "pp": (ParallelSizes(pipeline=2), {}, RECOMPUTED),
    "pp-interleaved": (
        ParallelSizes(pipeline=2),
        {"pipeline_schedule": "Interleaved1F1B", "pipeline_stages_per_rank": 2},
        RECOMPUTED[:1],
    ),
    "pp-fsdp2": (ParallelSizes(pipeline=2, shard=2), {}, RECOMPUTED[1:] + OFFLOADED[1:]),
}
"""Sizes, settings of `dtensor_cfg`, and what is added to them."""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "llama"
    tiny_model("llama", **MODEL).save_pretrained(path)
    return path


def apart(one: Trained, other: Trained) -> list[str]:
    """What is not bit for bit the same."""
    wrong = [f"step {i}" for i, (a, b) in enumerate(zip(one.metrics, other.metrics, strict=True)) if a != b]
    for step, (grads, expected) in enumerate(zip(one.grads, other.grads, strict=True)):
        assert grads.keys() == expected.keys()
        wrong += [f"gradient {step} of {name}" for name in grads if not torch.equal(grads[name], expected[name])]
    wrong += [f"weight {name}" for name in one.weights if not torch.equal(one.weights[name], other.weights[name])]
    if not all(map(torch.equal, [*one.logprobs, one.reference], [*other.logprobs, other.reference])):
        wrong.append("log-probabilities")
    return wrong


def rank_differences(
    rank: int, sizes: ParallelSizes, folder: Path, dtensor: dict[str, Any], added: list[dict[str, Any]]
) -> list[str]:
    """On one rank of a mesh: what differs once something is added."""
    del rank
    torch.use_deterministic_algorithms(True)
    mesh = Mesh(sizes, torch.device("cpu"))
    settings = size_keys(sizes) | dtensor
    wrong: list[str] = []
    for job in JOBS:
        plain = train(job, folder, mesh, **settings)
        for more in added:
            found = train(job, folder, mesh, **settings, **more)
            wrong += [f"{job} with {more}: {line}" for line in apart(found, plain)]
    return wrong


ALWAYS = ("fsdp2", "cp", "pp-fsdp2")


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.nightly) for name in MESHES]
)
def test_a_mesh_trains_the_same(name: str, llama: Path) -> None:
    sizes, settings, added = MESHES[name]
    wrong = [
        line for lines in run_ranks(rank_differences, sizes.world_size, sizes, llama, settings, added) for line in lines
    ]
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("job", JOBS, ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_process_trains_the_same(job: Job, precision: str, llama: Path) -> None:
    job = Job(job.objective, job.share_prefixes, job.max_tokens, {"precision": precision})
    plain = train(job, llama)
    for added in RECOMPUTED:
        assert not apart(train(job, llama, **added), plain)


def one_rank(rank: int, folder: Path) -> list[Trained]:
    """A mesh of one rank whose weights rest on the CPU."""
    del rank
    mesh = Mesh(ParallelSizes(), torch.device("cpu"))
    return [train(job, folder, mesh, cpu_offload=True) for job in JOBS]


def test_one_rank_can_keep_its_weights_on_the_cpu(llama: Path) -> None:
    (offloaded,) = run_ranks(one_rank, 1, llama)
    for job, found in zip(JOBS, offloaded, strict=True):
        assert not apart(found, train(job, llama))


def test_an_optimizer_that_makes_room_trains_the_same(llama: Path) -> None:
    adam: dict[str, Any] = {"optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 0.01}}, "precision": "bfloat16"}
    resting = {**adam, "offload_optimizer_for_logprob": True}
    plain, rested = (train(Job("grpo", True, 64, settings), llama) for settings in (adam, resting))
    assert not apart(rested, plain)
