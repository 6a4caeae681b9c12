"""A training step on a GPU is that on a CPU, however it is cut, shared or compiled, and it is saved bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_rl.objectives.policy import ClippedPolicyObjective
from tiny_batches import rollout_batch
from tiny_gpu import make_backend, masters, needs_gpu, save_model
from tiny_models import tiny_model

pytestmark = needs_gpu

OBJECTIVE = ClippedPolicyObjective(kl_weight=0.1)
BATCH = rollout_batch(tiny_model("qwen2"), temperature=0.8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def change(folder: Path, device: str, precision: str, **changes: Any) -> Tensor:
    """What one step changes in the weights, flat."""
    backend = make_backend(folder, device, precision, **changes)
    before = masters(backend)
    metrics = backend.train(BATCH, OBJECTIVE)
    assert metrics["tokens"].value == BATCH.num_tokens
    return masters(backend) - before


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("changes", [{}, {"train_mb_tokens": 30}, {"share_prefixes": False, "logprob_chunk_size": 5}])
def test_a_float32_step_is_that_of_the_cpu(folder: Path, changes: dict[str, Any]) -> None:
    assert apart(change(folder, "cuda", "float32", **changes), change(folder, "cpu", "float32")) <= 1e-4


def test_a_bfloat16_step_is_close_to_it(folder: Path) -> None:
    exact = change(folder, "cpu", "float32")
    for precision in ("bfloat16", "bfloat16_autocast"):
        assert apart(change(folder, "cuda", precision), exact) <= 0.1


def test_sharing_prefixes_changes_a_bfloat16_step_by_its_rounding_alone(folder: Path) -> None:
    shared, alone = (change(folder, "cuda", "bfloat16", share_prefixes=share) for share in (True, False))
    assert apart(shared, alone) <= 0.1


def test_a_compiled_step_is_the_plain_one(folder: Path) -> None:
    compiled = change(folder, "cuda", "float32", compile=True, train_mb_tokens=60)
    assert apart(compiled, change(folder, "cuda", "float32")) <= 1e-4


def test_a_state_is_restored_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 0.01}}}
    saved, restored = (make_backend(folder, "cuda", "bfloat16", **changes) for _ in range(2))
    for _ in range(2):
        saved.train(BATCH, OBJECTIVE)
    saved.save(tmp_path / "state")
    restored.load(tmp_path / "state")
    assert torch.equal(masters(restored), masters(saved))
    for (name, one), (_, other) in zip(restored.named_weights(), saved.named_weights(), strict=True):
        assert one.device.type == "cuda" and torch.equal(one, other), name
    states = [backend._optimizer.state_dict()["state"] for backend in (restored, saved)]
    for index, moments in states[1].items():
        for name, moment in moments.items():
            assert torch.equal(states[0][index][name].cpu(), moment.cpu()), name
    restored.train(BATCH, OBJECTIVE)
    assert torch.isfinite(masters(restored)).all()
