"""Where a loop gets its rollouts: tasks through the sampler and the environments, for training and for validation."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from nemo_rl.data.types import RolloutGroup, SamplingParams, Task
from nemo_rl.errors import RolloutError
from nemo_rl.interfaces import Environment, Sampler
from nemo_rl.metrics import Metrics, Sum, scalars
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

    def groups(self, tasks: Iterable[Task], step: int) -> Collected:
        """Sample and judge the groups of one training step.

        Raises:
            RolloutError: more groups failed than the run tolerates, or all of them.
        """
        tasks = tuple(tasks)
        collected = self._collect(tasks, self.sampling, self.group_size, step)
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
        collected = self._collect(tasks, replace(self.sampling, temperature=0.0), 1, 0)
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

    def _collect(self, tasks: tuple[Task, ...], sampling: SamplingParams, group_size: int, step: int) -> Collected:
        return self.runner.run(
            collect(
                tasks,
                group_size=group_size,
                generator=self.generator,
                environments=self.environments,
                decode=self.decode,
                sampling=sampling,
                seed=request_seed(self.seed, step, 0, 0),
                deadline_seconds=self.deadline_seconds,
            )
        )
