"""Tasks to judged groups, with a real math environment and reward functions that really fail."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_rl.data.types import Completion, GenerationRequest, Message, SamplingParams, StopReason, Task
from nemo_rl.environments.function import FunctionEnvironment
from nemo_rl.environments.math import MathEnvironment
from nemo_rl.errors import ConfigError, DataError
from nemo_rl.interfaces import Environment
from nemo_rl.metrics import Metrics, merge, scalars
from nemo_rl.rollouts.collect import Collected, collect, request_seed

SAMPLING = SamplingParams(max_new_tokens=4)
EOS = 99
REWARDS = """
import pathlib, time
def broken(completion): raise RuntimeError("no judge today")
def breaks_on_odd(completion): return 1.0 if int(completion) % 2 == 0 else float("nan")
def breaks_once(completion, log):
    path = pathlib.Path(log)
    tries = path.read_text() if path.exists() else ""
    path.write_text(tries + completion + " ")
    if completion not in tries.split(): raise RuntimeError("first time")
    return 1.0
def slow(completion): time.sleep(5.0); return 1.0
"""


class CountingGenerator:
    """Answers request i of a call with the digits of `first + i`, one token each, and an end token."""

    def __init__(self, first: int = 10, stop_reason: StopReason = "stop") -> None:
        self.first = first
        self.stop_reason: StopReason = stop_reason
        self.calls: list[list[GenerationRequest]] = []

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        self.calls.append(list(requests))
        return [self._completion(self.first + place) for place in range(len(requests))]

    def _completion(self, number: int) -> Completion:
        ids = torch.tensor([*(int(digit) for digit in str(number)), EOS])
        return Completion(ids, -0.5 * torch.ones(len(ids)), self.stop_reason, policy_version=7)

    def load_weights(self, weights: Iterator[tuple[str, Tensor]] | None, version: int) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...
    def reset_prefix_cache(self) -> None: ...
    def metrics(self) -> Metrics:
        return {}


def decode(token_ids: Tensor) -> str:
    return "".join(str(token) for token in token_ids.tolist() if token != EOS)


def task(index: int = 0, environment: str = "math", prompt: Sequence[int] = (50, 51, 52), **extra: str) -> Task:
    messages = (Message(role="user", content="?"),)
    return Task(messages, environment, {"ground_truth": "12", **extra}, index, torch.tensor(prompt))


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Environment]:
    file = tmp_path_factory.mktemp("collect") / "rewards.py"
    file.write_text(REWARDS)
    functions = ("broken", "breaks_on_odd", "breaks_once", "slow")
    math = MathEnvironment(num_workers=1, timeout_seconds=1.0, extraction="last_number")
    return {"math": math} | {name: FunctionEnvironment(f"{file}:{name}") for name in functions}


def run(
    tasks: Sequence[Task],
    environments: Mapping[str, Environment],
    generator: CountingGenerator | None = None,
    *,
    group_size: int = 4,
    deadline_seconds: float | None = None,
) -> Collected:
    return asyncio.run(
        collect(
            tasks,
            group_size=group_size,
            generator=generator or CountingGenerator(),
            environments=environments,
            decode=decode,
            sampling=SAMPLING,
            seed=3,
            deadline_seconds=deadline_seconds,
        )
    )


def test_a_rollout_is_the_prompt_and_what_was_sampled(environments: Mapping[str, Environment]) -> None:
    (group,) = run([task(5)], environments).groups
    assert group.task.index == 5
    rollout = group.rollouts[2]
    assert rollout.token_ids.tolist() == [50, 51, 52, 1, 2, EOS]
    assert rollout.token_ids.dtype == torch.int64
    assert rollout.loss_mask.tolist() == [False] * 3 + [True] * 3
    assert rollout.rollout_logprobs.tolist() == [0, 0, 0, -0.5, -0.5, -0.5]
    assert rollout.rollout_logprobs.dtype == torch.float32
    assert [message["content"] for message in rollout.messages] == ["?", "12"]
    assert (rollout.stop_reason, rollout.policy_version) == ("stop", 7)
    assert rollout.details == {"extracted": "12", "ground_truth": "12"}
    assert [rollout.reward for rollout in group.rollouts] == [0, 0, 1, 0]


def test_all_requests_go_out_in_one_call_with_groups_side_by_side(environments: Mapping[str, Environment]) -> None:
    generator = CountingGenerator()
    run([task(0, prompt=[1]), task(1, prompt=[2, 3])], environments, generator, group_size=2)
    (requests,) = generator.calls
    assert [request.prompt_ids.tolist() for request in requests] == [[1], [1], [2, 3], [2, 3]]
    assert len({request.seed for request in requests}) == 4
    assert all(request.sampling == SAMPLING for request in requests)


def test_seeds_depend_on_the_task_and_not_on_the_batch(environments: Mapping[str, Environment]) -> None:
    together, alone = CountingGenerator(), CountingGenerator()
    run([task(8), task(4)], environments, together, group_size=2)
    run([task(4)], environments, alone, group_size=2)
    assert [request.seed for request in together.calls[0][2:]] == [request.seed for request in alone.calls[0]]
    assert request_seed(3, 4, 0, 0) == alone.calls[0][0].seed == 3923194772916662098


def test_duplicate_prompts_stay_separate_groups_with_draws_of_their_own(
    environments: Mapping[str, Environment],
) -> None:
    generator = CountingGenerator()
    collected = run([task(1), task(1)], environments, generator, group_size=2)
    assert [[decode(r.token_ids[3:]) for r in group.rollouts] for group in collected.groups] == [
        ["10", "11"],
        ["12", "13"],
    ]
    assert len({request.seed for request in generator.calls[0]}) == 4


def test_one_failure_drops_its_whole_group_and_no_other(environments: Mapping[str, Environment]) -> None:
    tasks = [task(0), task(1, "breaks_on_odd"), task(2, "broken"), task(3)]
    collected = run(tasks, environments)
    assert [group.task.index for group in collected.groups] == [0, 3]
    assert [(drop.task.index, drop.reason) for drop in collected.dropped] == [
        (1, "environment_failure"),
        (2, "environment_failure"),
    ]
    assert "returned nan" in collected.dropped[0].message
    assert "no judge today" in collected.dropped[1].message
    figures = scalars(collected.metrics)
    assert figures["dropped_groups"] == figures["dropped_groups/environment_failure"] == 2
    assert figures["reward/mean"] == 1 / 8


def test_a_failure_is_retried_once(environments: Mapping[str, Environment], tmp_path: Path) -> None:
    log = tmp_path / "log"
    collected = run([task(0, "breaks_once", log=str(log))], environments, group_size=1)
    assert log.read_text().split() == ["10", "10"]
    assert collected.dropped == []
    assert collected.groups[0].rollouts[0].reward == 1.0


def test_judging_beyond_the_deadline_drops_the_group(environments: Mapping[str, Environment]) -> None:
    collected = run([task(0), task(1, "slow")], environments, group_size=2, deadline_seconds=0.5)
    assert [group.task.index for group in collected.groups] == [0]
    assert [drop.reason for drop in collected.dropped] == ["deadline"]


def test_figures_are_those_of_the_rollouts(environments: Mapping[str, Environment]) -> None:
    generator = CountingGenerator(first=98, stop_reason="length")
    collected = run([task(0), task(1, ground_truth="102")], environments, generator)
    figures = scalars(collected.metrics)
    assert figures["reward/mean"] == 1 / 8
    assert figures["rewards/reward"] == 1 / 8
    assert figures["environment/accuracy"] == 1 / 8
    assert (figures["reward/min"], figures["reward/max"]) == (0, 1)
    assert figures["reward/std"] == pytest.approx((1 / 8 * 7 / 8) ** 0.5)
    assert figures["response_length/mean"] == (2 * 3 + 6 * 4) / 8
    assert figures["response_length/max"] == 4
    assert figures["share_truncated"] == 1
    assert figures["share_no_spread"] == 0.5
    assert figures["dropped_groups"] == 0
    assert collected.environment_seconds > 0
    assert scalars(merge([collected.metrics, collected.metrics]))["reward/std"] == figures["reward/std"]


def test_impossible_tasks_are_refused_before_anything_is_sampled(environments: Mapping[str, Environment]) -> None:
    generator = CountingGenerator()
    with pytest.raises(ConfigError, match="'chess'"):
        run([task(0, "chess")], environments, generator)
    with pytest.raises(DataError, match="task 9 has no token ids"):
        run([Task((), "math", index=9)], environments, generator)
    assert generator.calls == []
