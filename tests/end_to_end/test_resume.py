"""A run that is killed or interrupted goes on as if nothing had happened."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tiny_run import (  # pyright: ignore[reportImplicitRelativeImport]
    VOWELS,
    assert_same_run,
    in_process,
    launch,
    overrides,
    records,
    reward_file,
)

# Judges as VOWELS does, but the second call of step 4 (3 prompts x 4 answers a step) never returns.
BLOCKED_IN_STEP_4 = f"""
import itertools, pathlib, time
{VOWELS}
judge, calls = reward, itertools.count(1)

def reward(completion: str) -> float:
    if next(calls) > 37:
        pathlib.Path(__file__).with_name("blocked").touch()
        time.sleep(600)
    return judge(completion)
"""
SLOW = VOWELS.replace("    return", "    import time; time.sleep(0.3)\n    return")


def wait_for(path: Path, alive: int, seconds: float = 250) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline and psutil.pid_exists(alive), path
        time.sleep(0.02)


def test_a_run_killed_during_a_step_resumes_to_the_same_bits(tiny_llama: Path, tmp_path: Path) -> None:
    settings = ("grpo.max_num_steps=6", "checkpointing.save_period=3", "policy.train_global_batch_size=4")
    reward = reward_file(tmp_path)
    killed = in_process(
        overrides(tiny_llama, reward_file(tmp_path / "b", BLOCKED_IN_STEP_4), tmp_path / "killed", *settings)
    )
    launch(overrides(tiny_llama, reward, tmp_path / "whole", *settings))

    wait_for(tmp_path / "b" / "blocked", killed.pid or 0)
    killed.kill()
    killed.join()
    assert [record["step"] for record in records(tmp_path / "killed")] == [1, 2, 3]
    assert not (tmp_path / "killed" / "summary.json").exists()

    outcome = launch(overrides(tiny_llama, reward, tmp_path / "killed", *settings))
    assert outcome.finished and outcome.step == 6
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 6)
    steps = records(tmp_path / "whole")
    rewards = [0.324430, 0.314449, 0.305062, 0.315602, 0.332640, 0.307436]
    losses = [-0.125417, 1.062826, -2.205384, -0.852690, 0.138438, 1.206198]
    assert [step["train/reward/mean"] for step in steps] == pytest.approx(rewards, rel=1e-4)
    assert [step["train/loss"] for step in steps] == pytest.approx(losses, rel=1e-3)


def test_a_kill_while_a_checkpoint_is_written_leaves_a_run_that_resumes(tiny_llama: Path, tmp_path: Path) -> None:
    settings = ("grpo.max_num_steps=4", "checkpointing.save_period=2")
    reward, folder = reward_file(tmp_path), tmp_path / "killed"
    killed = in_process(overrides(tiny_llama, reward, folder, *settings), killed_in_save=2)
    launch(overrides(tiny_llama, reward, tmp_path / "whole", *settings))
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in folder.glob("*step_*")) == ["step_2", "tmp_step_4"]

    launch(overrides(tiny_llama, reward, folder, *settings))
    assert sorted(path.name for path in folder.glob("*step_*")) == ["step_2", "step_4"]
    assert_same_run(tmp_path / "whole", folder, 4)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tiny_llama: Path, tmp_path: Path) -> None:
    folder, reward = tmp_path / "stopped", reward_file(tmp_path)
    slow = overrides(tiny_llama, reward_file(tmp_path / "b", SLOW), folder, "checkpointing.save_period=50")
    process = subprocess.Popen(
        [sys.executable, "-m", "nemo_rl.cli", "grpo", *slow, "grpo.max_num_steps=50"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for(folder / "rollouts" / "step_1.jsonl", process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    output, _ = process.communicate(timeout=60)

    assert process.returncode == 130, output
    done = len(records(folder))
    assert 1 <= done < 50 and (folder / f"step_{done}").is_dir()
    assert "Ctrl-C again stops at once" in output
    assert "Traceback" not in output
    command = shlex.split(output.splitlines()[-1].removeprefix("to continue"))
    assert command[command.index("grpo") :] == ["grpo", *slow, "grpo.max_num_steps=50"]

    steps = f"grpo.max_num_steps={done + 2}"
    resumed = subprocess.run([*command, steps, f"env.function.path={reward}"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    launch(overrides(tiny_llama, reward, tmp_path / "whole", steps))
    assert_same_run(tmp_path / "whole", folder, done + 2)


def test_ctrl_c_again_while_saving_stops_at_once_and_leaves_the_checkpoint_before(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder, reward = tmp_path / "stopped", reward_file(tmp_path)
    steps = ("grpo.max_num_steps=50", "checkpointing.save_period=2")
    process = in_process(overrides(tiny_llama, reward, folder, *steps), stuck_in_save=2)
    pid = process.pid or 0
    wait_for(folder / "rollouts" / "step_3.jsonl", pid)  # so that there is something to save besides step 2
    os.kill(pid, signal.SIGINT)
    wait_for(tmp_path / "stopped.stuck", pid)
    os.kill(pid, signal.SIGINT)
    process.join(timeout=20)
    code, output = process.exitcode, (tmp_path / "stopped.log").read_text()
    process.kill()
    assert code == 130, output
    assert "Ctrl-C again stops at once" in output and "Traceback" not in output
    assert [path.name for path in folder.glob("step_*")] == ["step_2"]

    launch(overrides(tiny_llama, reward, folder, "grpo.max_num_steps=4"))
    launch(overrides(tiny_llama, reward, tmp_path / "whole", "grpo.max_num_steps=4"))
    assert_same_run(tmp_path / "whole", folder, 4)
