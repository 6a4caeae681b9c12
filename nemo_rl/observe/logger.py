"""The run's records: metrics to every sink, rollouts to files. Failing to record never stops a run."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from nemo_rl.atomic import write_text_atomically
from nemo_rl.data.types import Rollout, RolloutGroup, Task
from nemo_rl.metrics import Histogram, Metric, scalars
from nemo_rl.observe.sinks import Sink, complete_lines

_log = logging.getLogger(__name__)


class RolloutWriter:
    """Writes `folder/step_N.jsonl`, one line per rollout, whole or not at all.

    A line holds `step`, `task` (the task's index), `group` and `sample` (places in the step's batch and in the group),
    `messages`, `completion` (the policy's last message), `rewards` by name, `reward` (their sum), `advantage`,
    `stop_reason`, `num_tokens` (sampled ones), `policy_version`, the environment's `metrics` and `details`, and the
    task's `extra`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, step: int, groups: Sequence[RolloutGroup], advantages: Iterable[float] | None = None) -> Path:
        """Write the rollouts of a step; `advantages` has one number per rollout, in order.

        Raises:
            OSError: the folder cannot be written.
            ValueError: there are more or fewer advantages than rollouts.
        """
        samples = [
            (number, sample, group.task, rollout)
            for number, group in enumerate(groups)
            for sample, rollout in enumerate(group.rollouts)
        ]
        per_rollout = [None] * len(samples) if advantages is None else list(advantages)
        records = [
            {"step": step, "group": number, "sample": sample, "advantage": advantage, **_record(task, rollout)}
            for (number, sample, task, rollout), advantage in zip(samples, per_rollout, strict=True)
        ]
        lines = [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records]
        path = self._folder / f"step_{step}.jsonl"
        write_text_atomically(path, "".join(lines))
        return path


def _record(task: Task, rollout: Rollout) -> dict[str, object]:
    answers = [message["content"] for message in rollout.messages if message["role"] == "assistant"]
    return {
        "task": task.index,
        "messages": rollout.messages,
        "completion": answers[-1] if answers else "",
        "rewards": rollout.rewards,
        "reward": rollout.reward,
        "stop_reason": rollout.stop_reason,
        "num_tokens": int(rollout.loss_mask.sum()),
        "policy_version": rollout.policy_version,
        "metrics": rollout.metrics,
        "details": rollout.details,
        "extra": task.extra,
    }


class RunLogger:
    """Sends metrics to every sink and rollouts to their writer; one that raises is left out from then on.

    The first failure of a sink is logged as one warning. A context manager: leaving it closes the sinks.
    """

    def __init__(self, sinks: Sequence[Sink], rollouts: RolloutWriter | None = None) -> None:
        self._sinks = list(sinks)
        self._rollouts = rollouts

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Record the figures of `step`: a number per metric, and the values of each `Histogram`."""
        figures = scalars(metrics)
        histograms = {name: metric.values for name, metric in metrics.items() if isinstance(metric, Histogram)}
        self._sinks = [sink for sink in self._sinks if _survives(sink, sink.log, step, figures, histograms)]

    def log_rollouts(
        self, step: int, groups: Sequence[RolloutGroup], advantages: Iterable[float] | None = None
    ) -> None:
        """Write the rollouts of `step`, if a writer was given."""
        writer = self._rollouts
        if writer is not None and not _survives(writer, writer.write, step, groups, advantages):
            self._rollouts = None

    def close(self) -> None:
        for sink in self._sinks:
            _survives(sink, sink.close)
        self._sinks = []

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _survives(recorder: object, action: Callable[..., object], *arguments: object) -> bool:
    """Whether `action` succeeds; if not, say so."""
    try:
        action(*arguments)
    except Exception as error:
        kind = type(recorder).__name__
        _log.warning(
            "%s failed and is switched off, the run goes on without it: %s: %s", kind, type(error).__name__, error
        )
        return False
    return True


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`, in order; null is read as NaN and a torn last line is passed over."""
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for _, record in complete_lines(path)
    ]
