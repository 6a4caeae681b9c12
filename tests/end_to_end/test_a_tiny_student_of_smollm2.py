"""A random student of a fraction of a million weights takes on what SmolLM2 thinks of answers to sums."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from nemo_rl.algorithms.launchers import launch
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.distillation import OffPolicyDistillationConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.metrics import Metrics
from nemo_rl.objectives.distillation import DistillationObjective
from tiny_run import make_tiny_llama, records  # pyright: ignore[reportImplicitRelativeImport]


def divergences(student: Path, folder: Path, num_steps: int) -> list[float]:
    """KL(teacher || student) over the teacher's 64 likeliest tokens, in nats a token of held-out answers."""
    settings = [
        f"policy.model_name={student}",
        "policy.train_global_batch_size=8",
        "policy.precision=float32",
        "policy.num_threads=1",
        "policy.optimizer.kwargs.lr=0.02",
        "teacher.precision=float32",
        f"off_policy_distillation.max_num_steps={num_steps}",
        "off_policy_distillation.val_period=4",
        "off_policy_distillation.max_val_samples=16",
        "data.validation.num_samples=16",
        "checkpointing.enabled=false",
        f"checkpointing.checkpoint_dir={folder}",
        "logger.tensorboard_enabled=false",
    ]
    launch(load_config(None, settings, OffPolicyDistillationConfig))
    return [line["val/loss"] or 0.0 for line in records(folder) if "val/loss" in line]


def test_a_tiny_student_approaches_smollm2_and_with_the_sign_turned_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_tiny_llama(tmp_path / "student", hidden_size=32)
    before, *between, after = divergences(student, tmp_path / "run", 12)
    assert before > 1.5
    assert after < 0.6 * before
    assert [before, *between, after] == sorted([before, *between, after], reverse=True)

    call = DistillationObjective.__call__

    def turned(objective: DistillationObjective, outputs: Any, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        loss, metrics = call(objective, outputs, tokens)
        return -loss if loss.requires_grad else loss, metrics

    monkeypatch.setattr(DistillationObjective, "__call__", turned)
    before, *_, after = divergences(student, tmp_path / "turned", 4)
    assert after > before
