"""A policy and a critic of its own: two workers whose run is the same wherever they live and however it is stopped."""

import signal
import subprocess
import sys
from pathlib import Path

import torch

from tiny_letters import make_letters_model  # pyright: ignore[reportImplicitRelativeImport]
from tiny_ppo import launch, ppo_overrides  # pyright: ignore[reportImplicitRelativeImport]
from tiny_run import assert_same_run, reward_file, saved_tensors  # pyright: ignore[reportImplicitRelativeImport]

SETTINGS = (
    "value={kind: separate, optimizer: {name: torch.optim.AdamW, kwargs: {lr: 0.02}}}",
    "policy.train_global_batch_size=4",
    "ppo.ppo_epochs=2",
    "loss_fn.reference_policy_kl_penalty=0.05",
)
KILLED_IN_THE_THIRD_SAVE = """
import os, signal, sys
from nemo_rl.cli import main
from nemo_rl.training.pytorch.backend import PyTorchBackend

save, saves = PyTorchBackend.save, []

def save_and_die(backend, folder, **how):
    save(backend, folder, **how)
    saves.append(folder)
    if len(saves) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

PyTorchBackend.save = save_and_die
main(["ppo", *sys.argv[1:]])
"""
"""Each checkpoint saves twice, so this is between the policy and the critic of the second one."""


def assert_same(one: Path, other: Path, step: int) -> None:
    """Records, rollouts, and weights and optimizers of policy and critic, bit for bit."""
    assert_same_run(one, other, step)
    left, right = (saved_tensors(folder, step, part="value") for folder in (one, other))
    assert left.keys() == right.keys() and len(left) > 20
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_a_kill_between_policy_and_critic_of_a_checkpoint_leaves_a_run_that_goes_on_to_the_same_bits(
    tmp_path: Path,
) -> None:
    model, reward = make_letters_model(tmp_path / "letters"), reward_file(tmp_path)
    steps = (*SETTINGS, "ppo.max_num_steps=4", "checkpointing.save_period=2")
    given = ppo_overrides(model, reward, tmp_path / "killed", *steps)
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_THE_THIRD_SAVE, *given], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    found = sorted(path.name for path in (tmp_path / "killed").glob("*step_*"))
    assert found == ["step_2", "tmp_step_4"]

    assert launch(given).step == 4
    launch(ppo_overrides(model, reward, tmp_path / "whole", *steps))
    assert_same(tmp_path / "whole", tmp_path / "killed", 4)


def test_two_workers_under_ray_do_what_they_do_in_this_process(tmp_path: Path) -> None:
    model, reward = make_letters_model(tmp_path / "letters"), reward_file(tmp_path)
    launch(ppo_overrides(model, reward, tmp_path / "local", *SETTINGS))
    remote = ("cluster.executor=ray", "cluster.startup_timeout_seconds=250")
    launch(ppo_overrides(model, reward, tmp_path / "ray", *SETTINGS, *remote))
    assert_same(tmp_path / "local", tmp_path / "ray", 3)
