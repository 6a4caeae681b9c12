"""When a run ends, and that what it did last is always saved."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from nemo_rl.algorithms.checkpoints import Checkpoints, TrainingInfo
from nemo_rl.algorithms.run import Run
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.data.datasets.arithmetic import ArithmeticDataset
from nemo_rl.data.loader import TaskLoader
from nemo_rl.data.types import Message, Rollout, RolloutGroup, Task
from nemo_rl.metrics import Mean, Metrics, Sum
from nemo_rl.observe.console import Console
from nemo_rl.observe.logger import RunLogger
from nemo_rl.observe.summary import PhaseTimer

MESSAGE = Message(role="user", content="?")
ROLLOUT = Rollout(torch.arange(2), torch.arange(2) > 0, torch.zeros(2), {"reward": 1.0}, "stop", 0, (MESSAGE,))
GROUP = RolloutGroup(Task((MESSAGE,), "math"), (ROLLOUT,))
FIGURES: Metrics = {"train/reward/mean": Mean(1.0), "train/tokens_sampled": Sum(1.0)}


class Weights:
    """A policy that is saved as nothing."""

    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


def nothing(step: int) -> None:
    del step


def all_right() -> tuple[Metrics, list[RolloutGroup]]:
    return {"accuracy": Mean(1.0)}, [GROUP]


def drive(
    folder: Path,
    *settings: str,
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
    with run:
        for step in run.steps(loader):
            next(loader)
            run.end_step(step, FIGURES, [GROUP], [0.0])
            run.keep(step, Weights(), loader, validate=validate)
            after_keep(step)
    return run


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_after_a_step_that_was_not_saved_does_one_more_and_saves_it(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    run = drive(tmp_path, after_keep=lambda step: interrupt() if step == 2 else None)
    assert run.interrupted and not run.finished
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


def test_a_checkpoint_holds_the_figures_of_its_own_step_only(tmp_path: Path) -> None:
    drive(tmp_path, "grpo.val_period=2", "grpo.max_num_steps=3", "checkpointing.save_period=1")
    held = [json.loads((tmp_path / f"step_{step}" / "training_info.json").read_text())["metrics"] for step in (1, 2, 3)]
    assert ["val/accuracy" in metrics for metrics in held] == [False, True, False]
    assert all(metrics["train/reward/mean"] == 1 for metrics in held)
