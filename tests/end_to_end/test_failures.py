"""A run that fails in the middle of a step has lost nothing: it goes on at that step as if nothing had happened."""

from itertools import count
from pathlib import Path

import pytest

from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import BackendError, RolloutError
from nemo_rl.interfaces import Objective
from nemo_rl.metrics import Metrics
from nemo_rl.training.pytorch.backend import PyTorchBackend
from tiny_run import (  # pyright: ignore[reportImplicitRelativeImport]
    VOWELS,
    assert_same_run,
    launch,
    overrides,
    records,
    reward_file,
)

STEPS = ("grpo.max_num_steps=4", "checkpointing.save_period=50", "policy.train_global_batch_size=4")
# Judges as VOWELS does until its 25th call: two steps of 3 prompts x 4 answers.
FAILS_IN_STEP_3 = f"""
import itertools
{VOWELS}
judge, calls = reward, itertools.count(1)

def reward(completion: str) -> float:
    if next(calls) > 24:
        raise OSError("gone")
    return judge(completion)
"""


def fail_train_call(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the optimizer steps of a run fail from that one on."""
    train, calls = PyTorchBackend.train, count(1)

    def failing(backend: PyTorchBackend, batch: TokenBatch, objective: Objective) -> Metrics:
        if next(calls) >= number:
            raise BackendError("the loss is nan")
        return train(backend, batch, objective)

    monkeypatch.setattr(PyTorchBackend, "train", failing)


def test_a_failed_step_is_repeated_to_the_same_bits(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, judging, training = (tmp_path / name for name in ("whole", "judging", "training"))
    reward, failing_reward = reward_file(tmp_path), reward_file(tmp_path / "b", FAILS_IN_STEP_3)
    launch(overrides(tiny_llama, reward, whole, *STEPS))
    with pytest.raises(RolloutError, match="OSError: gone"):
        launch(overrides(tiny_llama, failing_reward, judging, *STEPS))
    with monkeypatch.context() as patch, pytest.raises(BackendError, match="the loss is nan"):
        fail_train_call(patch, 7)  # the first of three in step 3
        launch(overrides(tiny_llama, reward, training, *STEPS))

    for folder in (judging, training):
        assert [path.name for path in folder.glob("*step_*")] == ["step_2"]
        assert launch(overrides(tiny_llama, reward, folder, *STEPS)).finished
        assert_same_run(whole, folder, 4)


def test_weights_in_the_middle_of_a_step_are_never_saved(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_train_call(monkeypatch, 8)  # the second of three in step 3
    with pytest.raises(BackendError, match="the loss is nan"):
        launch(overrides(tiny_llama, reward_file(tmp_path), tmp_path / "run", *STEPS))
    assert not list((tmp_path / "run").glob("*step_*"))


def test_prompts_that_are_left_out_are_counted(tiny_llama: Path, tmp_path: Path) -> None:
    long = "What is 1 + 1? " * 40
    file = tmp_path / "tasks.jsonl"
    lines = ['{"problem": "What is 2 + 2?", "answer": 4}\n', f'{{"problem": "{long}", "answer": 2}}\n'] * 3
    file.write_text("".join(lines))
    data = f"{{name: local, path: '{file}', prompt_key: problem, answer_key: answer, environment: function}}"
    settings = (f"data.train={data}", "data.too_long=skip", "data.shuffle=false", "grpo.max_num_steps=2")
    launch(overrides(tiny_llama, reward_file(tmp_path), tmp_path / "run", *settings))
    assert [line["train/num_skipped"] for line in records(tmp_path / "run")] == [2, 5]
