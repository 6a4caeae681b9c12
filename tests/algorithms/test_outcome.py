"""The figures of `summary.json` and the last lines of a run, by their definitions."""

import json
import shlex
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemo_rl.algorithms.launch import launch_grpo
from nemo_rl.algorithms.outcome import Outcome
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.workers.policy import PolicyWorker
from tiny_run import launch, overrides, reward_file  # pyright: ignore[reportImplicitRelativeImport]

TEST = "data.test={name: arithmetic, num_samples: 3, environment: function}"


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def continuation(printed: str) -> list[str]:
    """The arguments of the command in the last line."""
    label, _, command = printed.splitlines()[-1].partition("  ")
    assert label == "to continue"
    return shlex.split(command)


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outcome") / "run"
    launch(overrides(tiny_llama, reward_file(folder.parent), folder, TEST, "policy.train_global_batch_size=4"))
    return folder


def test_tokens_per_second_are_sampled_tokens_over_the_time_of_the_loop(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/tokens_sampled" in line]
    for line in steps:
        sampled = line["train/tokens_sampled"]
        assert line["timing/tokens_per_second"] * line["timing/step_seconds"] == pytest.approx(sampled)
        assert line["timing/generate_tokens_per_second"] * line["timing/generate_seconds"] == pytest.approx(sampled)
    summary = summary_of(finished)
    seconds = sum(summary["seconds_by_phase"][name] for name in ("generate", "logprobs", "train"))
    assert summary["tokens_per_second"] * seconds == pytest.approx(sum(line["train/tokens_sampled"] for line in steps))


def test_peak_memory_is_that_of_the_process_with_the_model(finished: Path) -> None:
    resident = psutil.Process().memory_info().rss  # the model is in this process, so its peak is about that
    assert 0.5 * resident < summary_of(finished)["peak_memory_bytes"] < 4 * resident


def test_each_phase_says_what_memory_it_took(finished: Path) -> None:
    summary = summary_of(finished)
    assert summary["peak_memory_bytes_by_phase"].keys() == summary["seconds_by_phase"].keys() >= {"generate", "train"}
    resident = psutil.Process().memory_info().rss
    for peak in summary["peak_memory_bytes_by_phase"].values():
        assert 0.5 * resident < peak <= summary["peak_memory_bytes"]


def test_peak_memory_is_that_of_the_worker_where_it_holds_more(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PolicyWorker, "peak_memory_bytes", lambda self: 1 << 50)
    launch(overrides(tiny_llama, reward_file(tmp_path), tmp_path / "run", "grpo.max_num_steps=1"))
    assert summary_of(tmp_path / "run")["peak_memory_bytes"] == 1 << 50


def test_without_a_judge_of_right_and_wrong_there_is_a_reward_and_no_accuracy(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "def reward(completion: str) -> float:\n    return -37.5\n"
    outcome = launch(overrides(tiny_llama, reward_file(tmp_path, code), tmp_path / "run", TEST))
    assert (outcome.reward_before, outcome.reward_after) == (-37.5, -37.5)
    assert (outcome.accuracy_before, outcome.accuracy_after) == (None, None)
    summary = summary_of(tmp_path / "run")
    assert [summary[f"{name}_before"] for name in ("accuracy", "reward")] == [None, -37.5]
    assert summary["accuracy_base_best_prompt"] is None
    printed = capsys.readouterr().out
    assert "greedy reward before training, by prompt: test -37.500\n" in printed
    assert "reward       -37.500 -> -37.500\n" in printed.replace("→", "->")
    assert "accuracy" not in printed


def test_with_one_the_best_prompt_is_the_best_of_the_measured_accuracies(finished: Path, tiny_llama: Path) -> None:
    """A run that was killed between its last step and its end sums up what its checkpoint remembers."""
    (finished / "summary.json").unlink()
    info = finished / "step_3" / "training_info.json"
    record = json.loads(info.read_text())
    assert record["before"].keys() == {"test/reward"}
    record["before"] = {"test/accuracy": 0.2, "test/reward": 0.1, "base/few/accuracy": 0.6, "base/few/reward": 0.9}
    record["before"]["val/accuracy"] = 0.95  # of other problems
    info.write_text(json.dumps(record))
    launch(overrides(tiny_llama, reward_file(finished.parent), finished, TEST, "policy.train_global_batch_size=4"))
    summary = summary_of(finished)
    assert (summary["accuracy_before"], summary["reward_before"]) == (0.2, 0.1)
    assert summary["accuracy_base_best_prompt"] == 0.6


def test_the_last_line_is_the_command_that_goes_on(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever limit ended the run is doubled, whether or not it was given before."""
    reward, folder = reward_file(tmp_path), tmp_path / "run folder"
    settings = overrides(tiny_llama, reward, folder, "data.train.num_samples=6", "grpo.max_num_epochs=1")

    def start(*arguments: str) -> Outcome:
        return launch_grpo(load_config(None, arguments, GRPOConfig), ["nemo-rl", "grpo", *arguments])

    assert start(*settings).step == 2
    command = continuation(capsys.readouterr().out)
    kept = [word for word in settings if not word.startswith("grpo.max_num_epochs")]
    assert command == ["nemo-rl", "grpo", *kept, "grpo.max_num_epochs=2"]

    assert start(*command[2:]).step == 3  # of three steps
    command = continuation(capsys.readouterr().out)
    assert command[-1] == "grpo.max_num_steps=6" and "grpo.max_num_steps=3" not in command
    assert start(*command[2:]).step == 4


def test_without_a_command_the_last_line_takes_the_configuration_of_the_run(
    finished: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("policy.train_global_batch_size=4", "grpo.max_num_steps=4")
    launch(overrides(tiny_llama, reward_file(finished.parent), finished, TEST, *more))
    command = continuation(capsys.readouterr().out)
    assert command == ["nemo-rl", "grpo", "--config", str(finished / "config.yaml"), "grpo.max_num_steps=8"]
    loaded = load_config(command[3], command[4:], GRPOConfig)
    assert launch_grpo(loaded).step == 8
