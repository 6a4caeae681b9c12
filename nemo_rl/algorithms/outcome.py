"""The end of a run: the accuracy it reached, the exported model, the summary, and what to do next."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_rl.algorithms.run import Run
from nemo_rl.algorithms.sampling import RolloutSource
from nemo_rl.atomic import atomic_folder
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.data.types import Task
from nemo_rl.observe.summary import (
    PhaseTimer,
    Summary,
    peak_device_memory_bytes,
    peak_memory_bytes,
    phase_line,
    write_summary,
)
from nemo_rl.workers.handles import Policy

_SUMMARY = "summary.json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a run ended.

    Attributes:
        folder: of the run.
        step: steps done.
        finished: false if it was interrupted or ran out of time, so that it can be continued.
        interrupted: whether Ctrl-C ended it.
        accuracy_after: greedy accuracy on the test problems, None when not measured.
    """

    folder: Path
    step: int
    finished: bool
    interrupted: bool
    accuracy_after: float | None


def earlier_outcome(folder: Path, step: int) -> Outcome | None:
    """The outcome that an earlier start of the run recorded, if it got to its end at `step`."""
    try:
        record = json.loads((folder / _SUMMARY).read_text())
        if record["steps"] != step or not record["finished"]:
            return None
        return Outcome(folder, step, finished=True, interrupted=False, accuracy_after=record["accuracy_after"])
    except (OSError, ValueError, KeyError):
        return None


def finish(
    config: GRPOConfig,
    run: Run,
    policy: Policy,
    source: RolloutSource,
    test: Sequence[Task],
    timer: PhaseTimer,
    *,
    first_step: int,
) -> Outcome:
    """Measure, export, write `summary.json` and say in the last lines what happened and what to do next."""
    finished = run.finished and not run.interrupted
    after = None
    if test and finished:
        with run.phase("evaluate"):
            after = source.accuracy(test)
        run.log_outcome("after/test", after)
    export = run.checkpoints.folder / "hf"
    if config.checkpointing.export_hf and finished:
        with run.phase("save"), atomic_folder(export) as work:
            policy.export(work)
    before = run.info.accuracies.get("test")
    loop_seconds = sum(timer.seconds.get(name, 0.0) for name in ("generate", "logprobs", "train"))
    summary = Summary(
        accuracy_before=before,
        accuracy_after=after,
        accuracy_base_best_prompt=max(run.info.accuracies.values(), default=None),
        steps=run.step,
        seconds_total=timer.total,
        seconds_by_phase=timer.seconds,
        tokens_per_second=run.tokens_sampled / loop_seconds if loop_seconds else 0.0,
        peak_memory_bytes=max(peak_memory_bytes(), peak_device_memory_bytes()),
        seed=config.grpo.seed,
        extra={"first_step": first_step, "model": config.policy.model_name, "finished": finished},
    )
    write_summary(run.checkpoints.folder / _SUMMARY, summary)
    run.console.finish(
        accuracy_before=before,
        accuracy_after=after,
        accuracy_base_best_prompt=summary.accuracy_base_best_prompt,
        rows=_rows(config, run, summary, export if finished else None),
    )
    return Outcome(
        run.checkpoints.folder, run.step, finished, interrupted=run.interrupted and not finished, accuracy_after=after
    )


def _rows(config: GRPOConfig, run: Run, summary: Summary, export: Path | None) -> dict[str, str]:
    folder, here = run.checkpoints.folder, Path.cwd()
    if folder.is_relative_to(here):
        folder = folder.relative_to(here)
    rows = {
        "steps": f"{run.step} of {config.grpo.max_num_steps}",
        "time": phase_line(summary.seconds_by_phase, summary.seconds_total),
        "metrics": f"{folder / 'metrics.jsonl'}  (curves: tensorboard --logdir {folder})",
        "rollouts": str(folder / "rollouts"),
    }
    if config.checkpointing.enabled and run.saved_step:
        rows["checkpoint"] = str(folder / run.checkpoints.path(run.saved_step).name)
    if export is not None and config.checkpointing.export_hf:
        rows["model"] = f"{folder / export.name}  (loads with transformers.AutoModelForCausalLM)"
    if config.checkpointing.enabled:
        again = "run the same command again" + (f": it resumes after step {run.saved_step}" if run.saved_step else "")
        more = f"run the same command with grpo.max_num_steps={2 * run.step}"
        rows["to continue"] = again if export is None else more
    return rows
