import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from nemo_rl.data.types import Message, Rollout, RolloutGroup, Task
from nemo_rl.metrics import Histogram, Mean, Sum
from nemo_rl.observe.logger import RolloutWriter, RunLogger, read_metrics
from nemo_rl.observe.sinks import JsonlSink


class FullDisk:
    """A sink whose every write fails."""

    def __init__(self) -> None:
        self.calls = 0

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Sequence[float]]) -> None:
        self.calls += 1
        raise OSError("no space left on device")

    def close(self) -> None:
        raise OSError("still no space left on device")


class Recorder:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float], dict[str, Sequence[float]]]] = []

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Sequence[float]]) -> None:
        self.seen.append((step, dict(scalars), dict(histograms)))

    def close(self) -> None: ...


def group_of_two(reply: str = "It is 5.") -> RolloutGroup:
    question = Message(role="user", content="What is 2 + 3? 答えは?")
    task = Task((question,), "math", {"ground_truth": "5"}, index=17)
    rollout = Rollout(
        token_ids=torch.arange(6),
        loss_mask=torch.tensor([False, False, True, True, True, True]),
        rollout_logprobs=torch.zeros(6),
        rewards={"correct": 1.0, "format": 0.5},
        stop_reason="length",
        policy_version=3,
        messages=(question, Message(role="assistant", content=reply)),
        metrics={"timed_out": 0.0},
        details={"extracted": "5"},
    )
    return RolloutGroup(task, (rollout, rollout))


def test_metrics_reach_every_sink_as_numbers_and_histograms() -> None:
    first, second = Recorder(), Recorder()
    with RunLogger([first, second]) as logger:
        logger.log(4, {"reward": Mean(3.0, 4), "tokens": Sum(128.0), "length": Histogram((1.0, 3.0))})

    expected = (4, {"reward": 0.75, "tokens": 128.0, "length": 2.0}, {"length": (1.0, 3.0)})
    assert first.seen == second.seen == [expected]


def test_a_failing_sink_is_switched_off_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = FullDisk()
    with caplog.at_level(logging.WARNING), RunLogger([broken, JsonlSink(tmp_path / "metrics.jsonl")]) as logger:
        for step in range(3):
            logger.log(step, {"reward": Mean(1.0)})

    assert broken.calls == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "FullDisk failed" in caplog.text and "no space left" in caplog.text
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_unwritable_rollouts_do_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING), RunLogger([], RolloutWriter(tmp_path / "file" / "rollouts")) as logger:
        logger.log_rollouts(0, [group_of_two()])
        logger.log_rollouts(1, [group_of_two()])

    assert len(caplog.records) == 1 and "RolloutWriter failed" in caplog.text


def test_rollouts_are_one_line_each_and_complete(tmp_path: Path) -> None:
    path = RolloutWriter(tmp_path).write(7, [group_of_two(), group_of_two()], [0.5, -0.5, 1.0, -1.0])

    assert path == tmp_path / "step_7.jsonl"
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_7.jsonl"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["group"], line["sample"], line["advantage"]) for line in lines] == [
        (0, 0, 0.5),
        (0, 1, -0.5),
        (1, 0, 1.0),
        (1, 1, -1.0),
    ]
    assert lines[0] == {
        "step": 7,
        "task": 17,
        "group": 0,
        "sample": 0,
        "messages": [
            {"role": "user", "content": "What is 2 + 3? 答えは?"},
            {"role": "assistant", "content": "It is 5."},
        ],
        "completion": "It is 5.",
        "rewards": {"correct": 1.0, "format": 0.5},
        "reward": 1.5,
        "advantage": 0.5,
        "stop_reason": "length",
        "num_tokens": 4,
        "policy_version": 3,
        "metrics": {"timed_out": 0.0},
        "details": {"extracted": "5"},
        "extra": {"ground_truth": "5"},
    }
    assert "答え" in path.read_text()


def test_text_that_is_no_valid_unicode_is_written_all_the_same(tmp_path: Path) -> None:
    path = RolloutWriter(tmp_path).write(0, [group_of_two(reply="half a \ud83d pair")])

    assert json.loads(path.read_text().splitlines()[0])["completion"] == "half a ? pair"


def test_a_missing_advantage_is_an_error_not_a_shift(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        RolloutWriter(tmp_path).write(0, [group_of_two()], [1.0])
