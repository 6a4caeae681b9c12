"""Tasks in, judged groups of rollouts out: sample every completion in one call, then judge them all at once."""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import Literal

import torch
from torch import Tensor

from nemo_rl.data.types import Completion, GenerationRequest, Message, Rollout, RolloutGroup, SamplingParams, Task
from nemo_rl.environments.registry import environment_named
from nemo_rl.errors import DataError, EnvironmentFailure
from nemo_rl.interfaces import Environment, Sampler
from nemo_rl.metrics import Histogram, Max, Mean, Metrics, Min, Sum, merge, prefixed

type DropReason = Literal["environment_failure", "deadline"]
"""`environment_failure`: judging failed twice; `deadline`: judging took too long."""


@dataclass(frozen=True, slots=True)
class DroppedGroup:
    """A task that yielded no group: nothing of it is trained on.

    Attributes:
        task: the task.
        reason: the kind of failure, under which it is counted.
        message: one sentence for people.
    """

    task: Task
    reason: DropReason
    message: str


@dataclass(frozen=True, slots=True)
class Collected:
    """What came of a batch of tasks.

    Attributes:
        groups: judged groups, in the order of the tasks.
        dropped: tasks without a group, in the same order.
        metrics: figures of the rollouts.
        environment_seconds: wall time of judging.
    """

    groups: list[RolloutGroup]
    dropped: list[DroppedGroup]
    metrics: Metrics
    environment_seconds: float = 0.0


async def collect(
    tasks: Sequence[Task],
    *,
    group_size: int,
    generator: Sampler,
    environments: Mapping[str, Environment],
    decode: Callable[[Tensor], str],
    sampling: SamplingParams,
    seed: int,
    deadline_seconds: float | None = None,
) -> Collected:
    """Sample `group_size` completions of every task in one `generate` call and judge them concurrently.

    A rollout whose environment fails is judged once more; if that fails too, its whole group is dropped and counted, as
    a failure is not a zero reward and a group without one of its members is biased.

    Args:
        tasks: with `token_ids`; equal prompts stay separate groups.
        group_size: completions of each task.
        generator: samples token ids.
        environments: by the names that tasks use.
        decode: token ids of one completion -> the text that the environment sees, special tokens skipped.
        sampling: for every request.
        seed: together with a task's index, its occurrence in the batch (it may come more than once) and the sample's
            number, it decides a completion's random draws, whatever else is in the batch.
        deadline_seconds: time to judge; groups that are not done by then are dropped.

    Raises:
        ConfigError: a task names an environment that does not exist.
        DataError: a task has no tokens yet.
    """
    judges = [environment_named(environments, task.environment) for task in tasks]
    completions = await generator.generate(_requests(tasks, group_size, sampling, seed))
    start = time.perf_counter()

    samples = batched(completions, group_size)
    judged = await asyncio.gather(
        *(
            _judge_group(task, answers, environment, decode, deadline_seconds)
            for task, answers, environment in zip(tasks, samples, judges, strict=True)
        )
    )
    groups = [group for group in judged if isinstance(group, RolloutGroup)]
    dropped = [group for group in judged if isinstance(group, DroppedGroup)]
    return Collected(groups, dropped, _metrics(groups, dropped), time.perf_counter() - start)


def request_seed(seed: int, index: int, sample: int, occurrence: int) -> int:
    """A seed in [0, 2^63) from the run's seed, a task's index, the sample's number and the task's occurrence."""
    digest = hashlib.blake2b(f"{seed},{index},{sample},{occurrence}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _requests(tasks: Sequence[Task], group_size: int, sampling: SamplingParams, seed: int) -> list[GenerationRequest]:
    occurrences: Counter[int] = Counter()
    requests: list[GenerationRequest] = []
    for task in tasks:
        occurrence = occurrences[task.index]
        occurrences[task.index] += 1
        seeds = (request_seed(seed, task.index, sample, occurrence) for sample in range(group_size))
        requests += [GenerationRequest(_prompt(task), sampling, request) for request in seeds]
    return requests


def _prompt(task: Task) -> Tensor:
    if task.token_ids is None:
        raise DataError(f"task {task.index} has no token ids; apply the chat template before collecting rollouts")
    return task.token_ids


async def _judge_group(
    task: Task,
    completions: Sequence[Completion],
    environment: Environment,
    decode: Callable[[Tensor], str],
    deadline_seconds: float | None,
) -> RolloutGroup | DroppedGroup:
    clock = asyncio.timeout(deadline_seconds)
    try:
        async with clock:
            rollouts = await asyncio.gather(*(_judge(task, one, environment, decode) for one in completions))
    except TimeoutError:
        if not clock.expired():
            raise
        message = f"environment {task.environment!r} did not judge task {task.index} within {deadline_seconds} s"
        return DroppedGroup(task, "deadline", message)
    failure = next((rollout for rollout in rollouts if isinstance(rollout, EnvironmentFailure)), None)
    if failure is not None:
        return DroppedGroup(task, "environment_failure", f"task {task.index} could not be judged: {failure}")
    return RolloutGroup(task, tuple(rollout for rollout in rollouts if isinstance(rollout, Rollout)))


async def _judge(
    task: Task, completion: Completion, environment: Environment, decode: Callable[[Tensor], str]
) -> Rollout | EnvironmentFailure:
    """One rollout, or, as data, why the environment could not judge it, twice."""
    messages = (*task.messages, Message(role="assistant", content=decode(completion.token_ids)))
    try:
        outcome = await environment.step(messages, task.extra)
    except EnvironmentFailure:
        try:
            outcome = await environment.step(messages, task.extra)
        except EnvironmentFailure as failure:
            return failure
    prompt = _prompt(task)
    sampled = torch.cat([torch.zeros_like(prompt, dtype=torch.bool), torch.ones(len(completion.token_ids)).bool()])
    return Rollout(
        token_ids=torch.cat([prompt, completion.token_ids]),
        loss_mask=sampled,
        rollout_logprobs=torch.cat([torch.zeros(len(prompt)), completion.logprobs]),
        rewards=outcome.rewards,
        stop_reason=completion.stop_reason,
        policy_version=completion.policy_version,
        messages=(*messages, *outcome.messages),
        metrics=outcome.metrics,
        details=outcome.details,
    )


def _metrics(groups: Sequence[RolloutGroup], dropped: Sequence[DroppedGroup]) -> Metrics:
    """Figures of the rollouts; a name has none where nothing was collected."""
    metrics = merge([_rollout_metrics(rollout) for group in groups for rollout in group.rollouts])
    rewards = [[rollout.reward for rollout in group.rollouts] for group in groups]
    if groups:
        flat = torch.tensor([reward for group in rewards for reward in group], dtype=torch.float64)
        # Weighted by its count, so that several collections of one step combine to their mean spread.
        metrics["reward/std"] = Mean(float(flat.std(correction=0)) * len(flat), len(flat))
        metrics["share_no_spread"] = Mean(sum(min(group) == max(group) for group in rewards), len(groups))
    counts = Counter(group.reason for group in dropped)
    metrics["dropped_groups"] = Sum(len(dropped))
    return metrics | {f"dropped_groups/{reason}": Sum(count) for reason, count in counts.items()}


def _rollout_metrics(rollout: Rollout) -> Metrics:
    length = float(rollout.loss_mask.sum())
    return {
        "reward/mean": Mean(rollout.reward),
        "reward/min": Min(rollout.reward),
        "reward/max": Max(rollout.reward),
        "reward/histogram": Histogram((rollout.reward,)),
        **prefixed("rewards", {name: Mean(reward) for name, reward in rollout.rewards.items()}),
        "response_length/mean": Mean(length),
        "response_length/max": Max(length),
        "tokens_sampled": Sum(length),
        "share_truncated": Mean(float(rollout.stop_reason == "length")),
        **prefixed("environment", {name: Mean(value) for name, value in rollout.metrics.items()}),
    }
