"""A checkpoint of any mesh is one of any other: weights, optimizer moments and schedule come back as they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_rl.distributed.mesh import Mesh, ParallelSizes
from nemo_rl.models.causal_lm import VALUE_HEAD
from nemo_rl.objectives.supervised import SupervisedObjective
from nemo_rl.training.pytorch.backend import PyTorchBackend
from nemo_rl.training.pytorch.loading import Head
from nemo_rl.training.pytorch.shards import whole
from ranks import run_ranks
from tiny_batches import rollout_batch
from tiny_mesh import MODEL, own_part, policy_config, size_keys, tokenizer
from tiny_models import tiny_model

MESHES: dict[str, tuple[ParallelSizes, dict[str, Any]]] = {
    "one": (ParallelSizes(), {}),
    "fsdp2": (ParallelSizes(shard=2), {}),
    "fsdp2-tp": (ParallelSizes(shard=2, tensor=2), {"sequence_parallel": True}),
    "fsdp2-3": (ParallelSizes(shard=3), {}),
    "hsdp": (ParallelSizes(replicate=2, shard=2), {}),
    "pp": (ParallelSizes(pipeline=2), {}),
    "pp-fsdp2": (ParallelSizes(pipeline=2, shard=2), {}),
    "pp-interleaved": (
        ParallelSizes(pipeline=2),
        {"pipeline_schedule": "Interleaved1F1B", "pipeline_stages_per_rank": 2},
    ),
}


def make(folder: Path, mesh: Mesh | None, settings: dict[str, Any], head: Head = "language") -> PyTorchBackend:
    config = policy_config(
        folder,
        optimizer={"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-2}},
        scheduler=[{"name": "torch.optim.lr_scheduler.LinearLR", "kwargs": {"total_iters": 4}}],
        dtensor_cfg=settings,
    )
    return PyTorchBackend(config, str(folder), tokenizer(), head=head, mesh=mesh)


def state(backend: PyTorchBackend) -> dict[str, torch.Tensor]:
    """All weights and moments, whole, and the learning rate."""
    named = backend._masters.named
    moments = backend._optimizer.state
    found = {name: whole(weight).clone() for name, weight in named.items()}
    for name, weight in named.items():
        found |= {f"{name}.{moment}": whole(value).clone() for moment, value in moments[weight].items()}
    return found | {"lr": torch.tensor(backend._optimizer.param_groups[0]["lr"])}


def run(
    rank: int, name: str, folder: Path, load: Path | None, save: Path | None, export: Path | None
) -> dict[str, torch.Tensor]:
    sizes, settings = MESHES[name]
    mesh = Mesh(sizes, torch.device("cpu")) if sizes.world_size > 1 else None
    backend = make(folder, mesh, {**size_keys(sizes), **settings})
    if load is not None:
        backend.load(load)
    if save is not None:
        batch = rollout_batch(tiny_model("llama"))
        if mesh is not None:
            batch = own_part(batch, mesh)
        for _ in range(2):
            backend.train(batch, SupervisedObjective())
        backend.save(save)
    if export is not None:
        backend.export(export)
    return state(backend)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resharding")
    for tied in (True, False):
        tiny_model("llama", tie_word_embeddings=tied, **MODEL).save_pretrained(path / str(tied))
    return path


@pytest.mark.parametrize(
    ("first", "second", "tied"),
    [
        ("fsdp2", "one", True),
        ("one", "fsdp2-tp", True),
        ("fsdp2-tp", "fsdp2-3", True),
        ("pp", "fsdp2", True),
        ("one", "pp", False),
        ("pp-fsdp2", "pp-interleaved", True),
        ("hsdp", "pp-fsdp2", True),
    ],
)
def test_a_checkpoint_fits_any_mesh(first: str, second: str, tied: bool, folder: Path, tmp_path: Path) -> None:
    saved, exported = tmp_path / "step", tmp_path / "hf"
    written = run_ranks(run, MESHES[first][0].world_size, first, folder / str(tied), None, saved, exported)
    found = run_ranks(run, MESHES[second][0].world_size, second, folder / str(tied), saved, None, None)
    expected = {name: tensor for tensors in written for name, tensor in tensors.items()}
    for ranks in (written, found):
        assert set().union(*ranks) == set(expected)  # each pipeline stage has its own
        for tensors in ranks:
            assert [name for name, tensor in tensors.items() if not torch.equal(tensor, expected[name])] == []
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {name for name, _ in model.named_parameters()} < expected.keys()
    assert [name for name, weight in model.named_parameters() if not torch.equal(weight, expected[name])] == []


def critic_of_stages(rank: int, folder: Path, saved: Path) -> list[str]:
    """Save a critic on a trunk in three stages, of which the last one alone has it."""
    sizes = ParallelSizes(pipeline=3)
    backend = make(folder, Mesh(sizes, torch.device("cpu")), size_keys(sizes), head="language_and_value")
    for name, parameter in backend.model.module.named_parameters():
        if name.startswith(VALUE_HEAD):
            parameter.data.fill_(0.5)
    backend.save(saved)
    return [name for name, _ in backend.model.module.named_parameters() if name.startswith(VALUE_HEAD)]


def test_a_critic_on_a_trunk_in_stages_is_saved_as_the_last_stage_has_it(folder: Path, tmp_path: Path) -> None:
    held = run_ranks(critic_of_stages, 3, folder / "True", tmp_path / "step")
    assert held == [[], [], [f"{VALUE_HEAD}.weight"]]
    alone = make(folder / "True", None, {}, head="language_and_value")
    alone.load(tmp_path / "step")
    assert (alone.model.module.get_parameter(f"{VALUE_HEAD}.weight") == 0.5).all()
