"""Adapters on a mesh: FSDP2 and HSDP train, merge, save and export what one process does."""

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_rl.config.schema.policy import PolicyConfig
from nemo_rl.distributed.mesh import Mesh, ParallelSizes
from nemo_rl.errors import ConfigError
from nemo_rl.training.pytorch.backend import PyTorchBackend
from ranks import run_ranks
from tiny_mesh import OBJECTIVES, Job, Trained, compare, job_batch, train, train_rank
from tiny_models import embedded_folder, tiny_model

LORA = {"enabled": True, "dim": 4, "alpha": 8}
JOBS = [
    Job("grpo", share_prefixes=True, max_tokens=1025, settings={"dtensor_cfg": {"lora_cfg": LORA}}),
    Job("dpo", share_prefixes=False, max_tokens=1026, settings={"dtensor_cfg": {"lora_cfg": LORA}}),
]
SIZES = {"fsdp2": ParallelSizes(shard=2), "hsdp": ParallelSizes(replicate=2, shard=2)}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora-mesh") / "llama"
    tiny_model("llama").save_pretrained(path)
    return path


@cache
def alone(job: str, folder: Path) -> Trained:
    return train(next(known for known in JOBS if str(known) == job), folder)


@pytest.mark.parametrize("name", SIZES)
def test_a_mesh_trains_the_adapters_that_one_process_trains(name: str, llama: Path) -> None:
    sizes = SIZES[name]
    ranks = run_ranks(train_rank, sizes.world_size, sizes, JOBS, llama, {})
    for number, job in enumerate(JOBS):
        trained = [rank[number] for rank in ranks]
        wrong = compare(job, sizes, trained, alone(str(job), llama))
        assert not wrong, "\n".join(wrong[:20])
        assert {name for name in trained[0].grads[0] if ".lora_" not in name} == set()
        assert all(part.share <= 0.51 for part in trained)


def policy(folder: Path, mesh: Mesh | None = None, **lora: str) -> PyTorchBackend:
    settings = {
        "model_name": str(folder),
        "train_global_batch_size": 9,
        "max_total_sequence_length": 64,
        "precision": "bfloat16",
        "device": "cpu",
        "optimizer": {"kwargs": {"lr": 0.02}},
        "generation": {"backend": "hf", "max_new_tokens": 8, "temperature": 0.8},
        "dtensor_cfg": {"lora_cfg": LORA | lora},
    }
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    return PyTorchBackend(PolicyConfig.model_validate(settings), str(folder), tokenizer, with_reference=True, mesh=mesh)


def bfloat16_rank(rank: int, folder: Path, out: Path) -> dict[str, Tensor]:
    """Train two steps with frozen weights in bfloat16, save, export, and return what a sampler would be sent."""
    del rank
    mesh = Mesh(ParallelSizes(shard=2), torch.device("cpu"))
    with pytest.raises(ConfigError, match="compressed weights are not spread"):
        policy(folder, mesh, quantize="int8")
    trained = policy(folder, mesh)
    dtypes = {p.dtype: p.requires_grad for p in trained.model.module.parameters()}
    assert dtypes == {torch.bfloat16: False, torch.float32: True}
    assert all(isinstance(p, DTensor) for p in trained.model.module.parameters())
    batch = job_batch(JOBS[0])
    batch = batch.select([[0, 1, 2], [3, 4, 5, 6, 7, 8]][mesh.rank])
    before = trained.logprobs(batch)
    for _ in range(2):
        trained.train(batch, OBJECTIVES["grpo"])
    assert not torch.equal(trained.logprobs(batch), before)
    with trained.reference():
        assert torch.equal(trained.logprobs(batch), before)
    trained.save(out / "policy")
    trained.export(out / "hf")
    return {**dict(trained.named_weights()), **dict(trained.named_adapter_weights())}


def test_frozen_weights_stay_in_bfloat16_and_checkpoint_and_export_are_those_of_one_process(
    llama: Path, tmp_path: Path
) -> None:
    sent = run_ranks(bfloat16_rank, 2, llama, tmp_path)
    resumed = policy(llama)
    resumed.load(tmp_path / "policy")
    here = {**dict(resumed.named_weights()), **dict(resumed.named_adapter_weights())}
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").named_parameters())
    adapter = load_file(tmp_path / "hf" / "adapter" / "adapter_model.safetensors")
    for weights in (*sent, exported | adapter):
        assert weights.keys() == here.keys()
        assert all(torch.equal(weight, here[name]) for name, weight in weights.items())
    assert any(weight.any() for name, weight in adapter.items() if ".lora_B" in name)
