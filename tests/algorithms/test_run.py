"""When a run ends, and that what it did last is always saved."""

import json
import math
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rl.algorithms.checkpoints import Checkpoints, TrainingInfo
from nemo_rl.algorithms.run import Run
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.data.datasets.arithmetic import ArithmeticDataset
from nemo_rl.data.loader import TaskLoader
from nemo_rl.data.types import Message, Rollout, RolloutGroup, Task
from nemo_rl.errors import BackendError, CheckpointError, ConfigError, RolloutError
from nemo_rl.metrics import Mean, Metrics, Sum
from nemo_rl.observe.console import Console
from nemo_rl.observe.logger import RunLogger
from nemo_rl.observe.summary import PhaseTimer
from nemo_rl.rollouts.collect import Collected

MESSAGE = Message(role="user", content="?")
ROLLOUT = Rollout(torch.arange(2), torch.arange(2) > 0, torch.zeros(2), {"reward": 1.0}, "stop", 0, (MESSAGE,))
GROUP = RolloutGroup(Task((MESSAGE,), "math"), (ROLLOUT,))
FIGURES: Metrics = {"train/reward/mean": Mean(1.0), "train/tokens_sampled": Sum(1.0)}


class Weights:
    """A policy that is saved as nothing and moved by the test."""

    def __init__(self, saving: Callable[[], None] = lambda: None) -> None:
        self.optimizer_steps = 0
        self.num_saves = 0
        self._saving = saving

    def save(self, folder: Path, *, in_background: bool = False) -> None:
        self.num_saves += 1
        self._saving()

    def finish_save(self, *, wait: bool = True) -> bool:
        return True

    def load(self, folder: Path) -> None: ...
    def describe(self) -> dict[str, Any]:
        return {"optimizer_steps": self.optimizer_steps}


def nothing(step: int) -> None:
    del step


def all_right() -> tuple[Metrics, list[RolloutGroup]]:
    return {"accuracy": Mean(1.0)}, [GROUP]


def drive(
    folder: Path,
    *settings: str,
    weights: Weights | None = None,
    in_step: Callable[[int], None] = nothing,
    after_keep: Callable[[int], None] = nothing,
    validate: Callable[[], tuple[Metrics, list[RolloutGroup]]] = all_right,
) -> Run:
    """A run whose steps do nothing, one problem each of four."""
    few = "data.train={name: arithmetic, num_samples: 4}"
    fixed = [f"checkpointing.checkpoint_dir={folder}", "checkpointing.save_period=100", few, "grpo.max_num_steps=10"]
    config = load_config(None, [*fixed, *settings], GRPOConfig).config
    checkpoints = Checkpoints(config.checkpointing, "")
    checkpoints.open_folder()
    run = Run(
        config,
        checkpoints=checkpoints,
        logger=RunLogger([]),
        console=Console(total_steps=10, sample_period=0),
        timer=PhaseTimer(),
        info=TrainingInfo(0),
    )
    loader = TaskLoader(ArithmeticDataset(4), 1, lambda task: task)
    weights = weights or Weights()
    with run:
        for step in run.steps(loader):
            next(loader)
            in_step(step)
            weights.optimizer_steps += 1
            run.end_step(step, FIGURES, Collected([GROUP], [], {}), [0.0])
            run.keep(step, weights, loader, validate=validate)
            after_keep(step)
    return run


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_after_a_step_that_was_not_saved_does_one_more_and_saves_it(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    run = drive(tmp_path, after_keep=lambda step: interrupt() if step == 2 else None)
    assert run.interrupted and not run.finished and run.why_ended == "it was interrupted"
    assert (run.step, run.checkpoints.steps()) == (3, [3])
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_during_a_validation_saves_the_step_it_belongs_to(tmp_path: Path) -> None:
    def interrupted() -> tuple[Metrics, list[RolloutGroup]]:
        interrupt()
        return all_right()

    run = drive(tmp_path, "grpo.val_period=2", validate=interrupted)
    assert (run.step, run.checkpoints.steps()) == (2, [2])


def test_a_run_ends_with_its_epochs_and_is_saved(tmp_path: Path) -> None:
    run = drive(tmp_path, "grpo.max_num_epochs=2")
    assert run.finished and (run.step, run.checkpoints.steps()) == (8, [8])
    assert run.why_ended == "max_num_epochs = 2 is reached"


def validations(*accuracies: float) -> Callable[[], tuple[Metrics, list[RolloutGroup]]]:
    """One validation after the other."""
    left = iter(accuracies)
    return lambda: ({"accuracy": Mean(next(left)), "loss": Mean(7.0)}, [GROUP])


@pytest.mark.parametrize(
    ("settings", "last_step", "why"),
    [
        (["patience=2"], 5, "val:accuracy has not improved on 0.55 in 2 validations"),
        (["patience=1"], 4, "val:accuracy has not improved on 0.55 in 1 validations"),
        (["patience=2", "min_delta=0.1"], 4, "val:accuracy has not improved on 0.5 in 2 validations"),
        (["patience=3", "higher_is_better=false"], 4, "val:accuracy has not improved on 0.1 in 3 validations"),
        (["patience=2", "metric_name=val:loss"], 3, "val:loss has not improved on 7 in 2 validations"),
        (["patience=4"], 8, "max_num_steps = 8 is reached"),
        (["min_delta=0.1"], 8, "max_num_steps = 8 is reached"),
    ],
)
def test_a_run_ends_when_its_validations_get_no_better(
    tmp_path: Path, settings: list[str], last_step: int, why: str
) -> None:
    given = [f"grpo.early_stopping.{setting}" for setting in settings]
    accuracies = validations(0.1, 0.5, 0.55, 0.55, 0.2, 0.3, 0.9, 0.9)
    run = drive(tmp_path, "grpo.val_period=1", "grpo.max_num_steps=8", *given, validate=accuracies)
    assert run.finished and (run.step, run.why_ended) == (last_step, why)
    assert run.checkpoints.steps() == [last_step]


def test_a_validation_that_is_no_number_is_no_improvement(tmp_path: Path) -> None:
    given = ("grpo.val_period=1", "grpo.early_stopping.patience=2")
    first, later = math.nan, (0.5, math.nan, math.nan)
    run = drive(tmp_path, *given, validate=validations(first, *later))
    assert run.step == 4 and run.why_ended.startswith("val:accuracy has not improved on 0.5")


def test_only_a_figure_that_is_measured_can_end_a_run(tmp_path: Path) -> None:
    given = ("grpo.val_period=1", "grpo.early_stopping.patience=2", "grpo.early_stopping.metric_name=val:acuracy")
    with pytest.raises(ConfigError, match=r"val:acuracy and the validation has no acuracy; did you mean val:accuracy"):
        drive(tmp_path, *given)


def test_a_checkpoint_holds_the_figures_of_its_own_step_only(tmp_path: Path) -> None:
    drive(tmp_path, "grpo.val_period=2", "grpo.max_num_steps=3", "checkpointing.save_period=1")
    held = [json.loads((tmp_path / f"step_{step}" / "training_info.json").read_text())["metrics"] for step in (1, 2, 3)]
    assert ["val/accuracy" in metrics for metrics in held] == [False, True, False]
    assert all(metrics["train/reward/mean"] == 1 for metrics in held)


def test_ctrl_c_during_a_save_ends_the_run_with_it(tmp_path: Path) -> None:
    weights = Weights(lambda: interrupt() if weights.num_saves == 2 else None)
    run = drive(tmp_path, "checkpointing.save_period=1", weights=weights)
    assert run.interrupted and (run.step, run.checkpoints.steps()) == (2, [1, 2])


def test_a_run_outside_of_the_main_thread_leaves_ctrl_c_alone(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(drive, tmp_path, "grpo.max_num_steps=1").result()
    assert run.finished and signal.getsignal(signal.SIGINT) is handler


def fail_in_step_3(step: int) -> None:
    if step == 3:
        raise RolloutError("no judge")


def test_a_step_that_fails_before_it_moves_a_weight_leaves_the_one_before_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RolloutError, match="no judge"):
        drive(tmp_path, in_step=fail_in_step_3)
    assert [path.name for path in tmp_path.glob("*step_*")] == ["step_2"]
    assert json.loads((tmp_path / "step_2" / "training_info.json").read_text())["step"] == 2
    assert torch.load(tmp_path / "step_2" / "train_dataloader.pt")["num_drawn"] == 2
    assert "step 2 is saved: the same command goes on after it" in capsys.readouterr().out


def test_a_step_that_fails_with_its_weights_half_moved_is_not_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Weights()

    def fail(step: int) -> None:
        if step == 3:
            weights.optimizer_steps += 1
            raise BackendError("the loss is nan")

    with pytest.raises(BackendError, match="the loss is nan"):
        drive(tmp_path, weights=weights, in_step=fail)
    assert weights.num_saves == 0 and not list(tmp_path.glob("*step_*"))
    assert "step 2 cannot be saved: the step that failed had begun to change" in capsys.readouterr().out


def test_a_validation_that_fails_leaves_its_step_saved(tmp_path: Path) -> None:
    def fail() -> tuple[Metrics, list[RolloutGroup]]:
        raise RolloutError("no judge")

    with pytest.raises(RolloutError, match="no judge"):
        drive(tmp_path, "grpo.val_period=2", validate=fail)
    assert [path.name for path in tmp_path.glob("*step_*")] == ["step_2"]


def test_a_failure_is_not_hidden_by_the_failure_to_save_after_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise OSError("no space left")

    with pytest.raises(RolloutError, match="no judge"):
        drive(tmp_path, weights=Weights(full), in_step=fail_in_step_3)
    assert "step 2 cannot be saved: cannot write the checkpoint" in capsys.readouterr().out
    weights = Weights(full)
    with pytest.raises(CheckpointError, match="no space left"):
        drive(tmp_path, "checkpointing.save_period=2", weights=weights)
    assert weights.num_saves == 1, "what just failed is not tried again"


def test_a_run_that_saves_nothing_saves_nothing_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match="no judge"):
        drive(tmp_path, "checkpointing.enabled=false", in_step=fail_in_step_3)
    assert not list(tmp_path.glob("*step_*"))
