"""Where a loop gets its rollouts: tasks through the sampler and the environments, for training and for validation."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from nemo_rl.config.schema.algorithms import DecoupledAdvantages, GRPOConfig
from nemo_rl.data.types import RolloutGroup, SamplingParams, Task
from nemo_rl.errors import RolloutError
from nemo_rl.interfaces import Environment, Sampler
from nemo_rl.metrics import Mean, Metrics, Sum, merge, scalars
from nemo_rl.rollouts.collect import Collected, collect, request_seed


@dataclass(frozen=True, slots=True)
class RolloutSource:
    """Collects groups of rollouts.

    Attributes:
        generator: samples.
        environments: judge, by name.
        decode: token ids -> text without special tokens.
        sampling: of training rollouts; validation is greedy with the same budget and stops.
        group_size: rollouts of a task in training.
        seed: of the run; every step has random draws of its own.
        max_failed_share: a step or validation with a larger share of dropped groups stops the run.
        deadline_seconds: time to judge a step's rollouts.
        validation: the tasks of `validate`.
        runner: the event loop that all rollouts of a run share.
    """

    generator: Sampler
    environments: Mapping[str, Environment]
    decode: Callable[[Tensor], str]
    sampling: SamplingParams
    group_size: int
    seed: int
    max_failed_share: float
    deadline_seconds: float | None
    validation: tuple[Task, ...]
    runner: asyncio.Runner

    def groups(self, tasks: Iterable[Task], step: int, round_number: int = 0) -> Collected:
        """Sample and judge the groups of one training step, or of one of several rounds of it.

        Raises:
            RolloutError: more groups failed than the run tolerates, or all of them.
        """
        tasks = tuple(tasks)
        seed = request_seed(self.seed, step, round_number, 0)
        collected = self._collect(tasks, self.sampling, self.group_size, seed)
        self._check(collected, f"step {step}")
        return replace(collected, metrics=collected.metrics | self.generator.metrics())

    def validate(self, tasks: Iterable[Task] | None = None) -> tuple[Metrics, list[RolloutGroup]]:
        """Answer tasks (by default the validation set) greedily.

        Returns:
            `accuracy` (the share judged right by environments that tell right from wrong), `reward`, `response_length`
            and `share_truncated`, of the `num_tasks` that could be judged, `dropped_groups`; and the rollouts.

        Raises:
            RolloutError: more tasks could not be judged than the run tolerates, or all of them.
        """
        tasks = self.validation if tasks is None else tuple(tasks)
        collected = self._collect(tasks, replace(self.sampling, temperature=0.0), 1, request_seed(self.seed, 0, 0, 0))
        self.generator.metrics()
        self._check(collected, "the validation")
        kept = {
            "environment/accuracy": "accuracy",
            "reward/mean": "reward",
            "response_length/mean": "response_length",
            "share_truncated": "share_truncated",
            "dropped_groups": "dropped_groups",
        }
        metrics = {short: collected.metrics[name] for name, short in kept.items() if name in collected.metrics}
        return metrics | {"num_tasks": Sum(len(collected.groups))}, collected.groups

    def score(self, tasks: Iterable[Task]) -> dict[str, float]:
        """Greedy mean `reward` on these tasks and, where an environment tells right from wrong, `accuracy`."""
        figures = scalars(self.validate(tasks)[0])
        return {name: figures[name] for name in ("accuracy", "reward") if name in figures}

    def _check(self, collected: Collected, where: str) -> None:
        failed, total = len(collected.dropped), len(collected.dropped) + len(collected.groups)
        if failed > self.max_failed_share * total or failed == total:
            raise RolloutError(
                f"{failed} of {total} groups of {where} failed and max_failed_group_share is "
                f"{self.max_failed_share:g}; the first: {collected.dropped[0].message}"
            )

    def _collect(self, tasks: tuple[Task, ...], sampling: SamplingParams, group_size: int, seed: int) -> Collected:
        return self.runner.run(
            collect(
                tasks,
                group_size=group_size,
                generator=self.generator,
                environments=self.environments,
                decode=self.decode,
                sampling=sampling,
                seed=seed,
                deadline_seconds=self.deadline_seconds,
            )
        )


def step_groups(config: GRPOConfig, source: RolloutSource, draws: Iterator[Sequence[Task]], step: int) -> Collected:
    """Collect the groups of one step; with dynamic sampling, go on until each has answers whose rewards differ.

    Rounds are kept in the order of the data. What the last one yields beyond a full step is left out and counted, so
    that no group is older than the weights it trains. All rounds are in the figures, whatever became of their groups.

    Raises:
        RolloutError: more groups failed than the run tolerates, or the rounds are used up before the step is full.
    """
    rule, wanted = config.grpo.dynamic_sampling, config.grpo.num_prompts_per_step
    if rule is None:
        return source.groups(next(draws), step)
    rounds: list[Collected] = []
    kept: list[RolloutGroup] = []
    while len(kept) < wanted:
        if len(rounds) == rule.max_tries:
            raise RolloutError(_not_full(step, len(kept), wanted, rounds))
        rounds.append(source.groups(next(draws), step, len(rounds)))
        kept += [group for group in rounds[-1].groups if has_spread(config, group)]
    judged = sum(len(one.groups) for one in rounds)
    metrics: Metrics = {
        "dynamic_sampling/rounds": Sum(len(rounds)),
        "dynamic_sampling/share_filtered": Mean(judged - len(kept), judged),
        "dynamic_sampling/surplus_groups": Sum(len(kept) - wanted),
    }
    return Collected(
        groups=kept[:wanted],
        dropped=[task for one in rounds for task in one.dropped],
        metrics=merge(one.metrics for one in rounds) | metrics,
        environment_seconds=sum(one.environment_seconds for one in rounds),
    )


def has_spread(config: GRPOConfig, group: RolloutGroup) -> bool:
    """Whether the rewards of a group differ, as the environment gave them, among the answers that are trained on.

    The sum of an answer's rewards is compared, or with GDPO, which keeps them apart, each of them.
    """
    counted = [one for one in group.rollouts if not config.grpo.overlong_filtering or one.stop_reason != "length"]
    if isinstance(config.grpo.adv_estimator, DecoupledAdvantages):
        return any(one.rewards != counted[0].rewards for one in counted)
    return any(one.reward != counted[0].reward for one in counted)


def _not_full(step: int, num_kept: int, wanted: int, rounds: Sequence[Collected]) -> str:
    judged, failed = (
        sum(map(len, lists)) for lists in zip(*((one.groups, one.dropped) for one in rounds), strict=True)
    )
    return (
        f"step {step} has {num_kept} of its {wanted} groups after {len(rounds)} rounds of {judged + failed} prompts in"
        f" all: of {judged - num_kept} the answers that count got equal rewards and {failed} could not be judged; use"
        " problems that are neither too easy nor too hard, raise grpo.num_generations_per_prompt, or raise"
        " grpo.dynamic_sampling.max_tries or batch_multiplier"
    )
