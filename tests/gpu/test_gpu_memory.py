"""What rests on the CPU leaves the GPU, comes back, and layers that compute again keep less there."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.distributed.memory import PeakMemory
from nemo_rl.distributed.mesh import Mesh, ParallelSizes, meeting
from nemo_rl.models.local import local_part
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.training.pytorch.backend import PyTorchBackend
from tiny_batches import rollout_batch
from tiny_gpu import make_backend, needs_gpu, save_model, tokenizer
from tiny_models import tiny_model

pytestmark = needs_gpu

OBJECTIVE = ClippedPolicyObjective(kl_weight=0.1)
BATCH = rollout_batch(tiny_model("qwen2"), temperature=0.8)
ADAM: dict[str, Any] = {"optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 0.01}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def trained(backend: PyTorchBackend) -> list[Tensor]:
    """Two steps with log-probabilities before, between and after them; what they gave, and the weights."""
    found: list[Tensor] = []
    for _ in range(2):
        found.append(backend.logprobs(BATCH))
        backend.train(BATCH, OBJECTIVE)
    found.append(backend.logprobs(BATCH))
    return [*found, *(weight.float().cpu() for _, weight in backend.named_weights())]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Up to the order in which a GPU adds, which AdamW's first steps make larger."""
    return all((a - b).norm() <= 0.2 * b.norm() for a, b in zip(one, other, strict=True))


def moments(backend: PyTorchBackend) -> list[Tensor]:
    return [value for state in backend._optimizer.state.values() for value in state.values()]


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_optimizer_rests_between_steps_and_changes_nothing(folder: Path, precision: str, tmp_path: Path) -> None:
    plain = make_backend(folder, "cuda", precision, **ADAM)
    resting = make_backend(folder, "cuda", precision, **ADAM, offload_optimizer_for_logprob=True)
    assert same(trained(resting), trained(plain))
    away = [*moments(resting), *resting._masters.copies]
    assert {tensor.device.type for tensor in away} == {"cpu"} and all(tensor.is_pinned() for tensor in away)
    assert all(parameter.is_cuda for parameter in resting.model.module.parameters())
    resting.save(tmp_path / "state")  # as it lies
    restored = make_backend(folder, "cuda", precision, **ADAM, offload_optimizer_for_logprob=True)
    restored.load(tmp_path / "state")
    before = allocated()
    restored.logprobs(BATCH)
    gone = before - allocated()
    assert gone >= sum(tensor.nbytes for tensor in away)
    for backend in (plain, resting, restored):
        backend.train(BATCH, OBJECTIVE)
    assert all(tensor.is_cuda for tensor in moments(resting) if tensor.dim())
    assert same(trained(resting), trained(plain))
    assert restored.logprobs(BATCH).isfinite().all()


def with_reference(folder: Path, precision: str, mesh: Mesh | None = None, **changes: Any) -> PyTorchBackend:
    """A backend on the GPU that keeps its starting weights."""
    section = make_backend(folder, "cpu", precision, **ADAM, **changes)._config
    section = section.model_copy(update={"device": "cuda"})
    return PyTorchBackend(section, str(folder), tokenizer(), mesh=mesh, with_reference=True)


def test_the_reference_rests_and_is_exchanged(folder: Path) -> None:
    found: list[list[Tensor]] = []
    held: list[int] = []
    weights = 0
    for rests in (True, False):
        before = allocated()
        backend = with_reference(folder, "bfloat16", reference_on_cpu=rests)
        held.append(allocated() - before)
        start = backend.logprobs(BATCH)
        backend.train(BATCH, OBJECTIVE)
        after = backend.logprobs(BATCH)
        assert not torch.equal(start, after)
        for _ in range(2):
            with backend.reference():
                assert torch.equal(backend.logprobs(BATCH), start)
            assert torch.equal(backend.logprobs(BATCH), after)
        found.append([start, after])
        weights = sum(parameter.nbytes for parameter in backend.model.module.parameters())
        del backend
    assert same(*found)
    assert held[1] - held[0] >= weights


def test_layers_that_compute_again_keep_less(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 1024, "num_hidden_layers": 12}
    tiny_model("qwen2", **sizes).save_pretrained(tmp_path)
    peaks: list[int] = []
    weights: list[list[Tensor]] = []
    for kind in (False, "selective", True):
        settings: dict[str, Any] = {"dtensor_cfg": {"activation_checkpointing": kind}}
        backend = make_backend(tmp_path, "cuda", "float32", **settings, share_prefixes=False)
        copies = (replace(BATCH, group_ids=BATCH.group_ids + 3 * number) for number in range(20))
        large = TokenBatch.concat(list(copies))
        backend.train(large, OBJECTIVE)
        before = allocated()
        torch.cuda.reset_peak_memory_stats()
        backend.train(large, OBJECTIVE)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        weights.append([parameter.detach().cpu() for parameter in backend.model.module.parameters()])
    print(f"peak above what is held: {peaks[0]:,} all, {peaks[1]:,} selective, {peaks[2]:,} full")
    assert peaks[0] > peaks[1] > peaks[2]
    for others in weights[1:]:
        for found, expected in zip(others, weights[0], strict=True):
            assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_weights_of_one_rank_rest_on_the_cpu(folder: Path) -> None:
    with meeting(ParallelSizes()) as places:
        mesh = places[0].join("cuda")
        try:
            for precision, bound in (("float32", 1e-4), ("bfloat16", 0.1)):
                before = allocated()
                offloaded = with_reference(folder, precision, mesh, dtensor_cfg={"cpu_offload": True})
                parameters = list(offloaded.model.module.parameters())
                assert allocated() - before < 0.1 * sum(parameter.nbytes for parameter in parameters)
                assert all(isinstance(p, DTensor) and p.to_local().device.type == "cpu" for p in parameters)
                assert offloaded.model.device.type == "cuda"
                start = offloaded.logprobs(BATCH)
                found = trained(offloaded)
                with offloaded.reference():
                    assert torch.equal(offloaded.logprobs(BATCH), start)
                assert torch.equal(offloaded.logprobs(BATCH), found[2])
                expected = trained(with_reference(folder, precision))
                for one, other in zip(found, expected, strict=True):
                    assert (one - other).norm() <= bound * other.norm() + 1e-6
                assert all(local_part(tensor).device.type == "cpu" for tensor in moments(offloaded))
        finally:
            torch.distributed.destroy_process_group()


def test_a_phase_on_a_gpu_has_the_peak_of_the_gpu() -> None:
    memory = PeakMemory()
    held = torch.zeros(1 << 20, device="cuda")
    memory.take()
    large = torch.zeros(1 << 26, device="cuda")
    del large
    assert memory.take() >= 4 * ((1 << 26) + (1 << 20))
    assert memory.take() < 4 * (1 << 26)
    assert held.is_cuda
