"""The end of a run: what it reached and why it ended, the exported model, the summary, and what to do next."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_rl.algorithms.run import Run
from nemo_rl.atomic import atomic_folder
from nemo_rl.config.schema.run import RunConfig
from nemo_rl.distributed.memory import peak_memory_bytes
from nemo_rl.observe.sinks import log_folder
from nemo_rl.observe.summary import PhaseTimer, Summary, memory_line, phase_line, write_summary
from nemo_rl.workers.handles import Policy

_SUMMARY = "summary.json"
_SCORES = ("accuracy_before", "accuracy_after", "reward_before", "reward_after")
_VALIDATIONS = ("validation_before", "validation_after")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a run ended.

    Attributes:
        folder: of the run.
        step: steps done.
        finished: false if it was interrupted or ran out of time, so that it can be continued.
        interrupted: whether Ctrl-C ended it.
        accuracy_before: greedy accuracy on the test problems before the first step; None when not measured, or when no
            environment tells right from wrong.
        accuracy_after: the same after the last step.
        reward_before: mean reward of the same answers before the first step; None when not measured.
        reward_after: the same after the last step.
        validation_before: loss and accuracy of the validation before the first step, as far as they were measured.
        validation_after: the same after the last step.
    """

    folder: Path
    step: int
    finished: bool
    interrupted: bool
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    reward_before: float | None = None
    reward_after: float | None = None
    validation_before: Mapping[str, float] = field(default_factory=dict)
    validation_after: Mapping[str, float] = field(default_factory=dict)


def earlier_outcome(folder: Path, step: int) -> Outcome | None:
    """The outcome that an earlier start of the run recorded, if it got to its end at `step`."""
    try:
        record = json.loads((folder / _SUMMARY).read_text())
        if record["steps"] != step or not record["finished"]:
            return None
        return Outcome(folder, step, True, False, **{name: record[name] for name in (*_SCORES, *_VALIDATIONS)})
    except (OSError, ValueError, KeyError):
        return None


def finish(
    config: RunConfig,
    run: Run,
    policy: Policy,
    timer: PhaseTimer,
    *,
    score: Callable[[], Mapping[str, float]] | None = None,
    first_step: int,
    command: Sequence[str],
) -> Outcome:
    """Measure, export, write `summary.json` and say in the last lines what happened and what to do next.

    Args:
        config: of the run.
        run: whose loop has ended.
        policy: to be exported.
        timer: of the run.
        score: measures `accuracy` and `reward` on the test set, if there is one.
        first_step: the steps that earlier starts of the run had done.
        command: what started this.
    """
    finished, ended = run.finished, run.why_ended
    before, after = run.info.before, dict[str, float]()
    if score is not None and finished:
        with run.phase("evaluate"):
            after = dict(score())
        for name, value in after.items():
            run.log_outcome(f"after/test/{name}", value)
    export = run.checkpoints.folder / "hf"
    if config.checkpointing.export_hf and finished:
        with run.phase("save"), atomic_folder(export) as work:
            policy.export(work)
    scores = {f"{name}_before": before.get(f"test/{name}") for name in ("accuracy", "reward")}
    scores |= {f"{name}_after": after.get(name) for name in ("accuracy", "reward")}
    validations = dict(zip(_VALIDATIONS, map(_validation, (before, run.info.metrics)), strict=True))
    summary = Summary(
        **scores,
        **validations,
        accuracy_base_best_prompt=max(
            (before[name] for name in before if name.endswith("/accuracy") and name != "val/accuracy"), default=None
        ),
        steps=run.step,
        seconds_total=timer.total,
        seconds_by_phase=timer.seconds,
        tokens_per_second=_tokens_per_second(run, timer),
        peak_memory_bytes=max(peak_memory_bytes(), policy.peak_memory_bytes()),
        peak_memory_bytes_by_phase=timer.peak_memory_bytes,
        seed=config.loop.seed,
        extra={"first_step": first_step, "model": config.policy.model_name, "finished": finished, "ended": ended},
    )
    write_summary(run.checkpoints.folder / _SUMMARY, summary)
    run.console.finish(
        **scores,
        **validations,
        accuracy_base_best_prompt=summary.accuracy_base_best_prompt,
        rows=_rows(config, run, summary, export if finished else None, command),
    )
    return Outcome(
        run.checkpoints.folder, run.step, finished, run.interrupted and not finished, **scores, **validations
    )


def _rows(config: RunConfig, run: Run, summary: Summary, export: Path | None, command: Sequence[str]) -> dict[str, str]:
    folder = run.checkpoints.folder
    logs = log_folder(config.logger, folder)
    curves = f"  (curves: tensorboard --logdir {_from_here(logs)})" if config.logger.tensorboard_enabled else ""
    rows = {
        "steps": f"{run.step} of {config.loop.max_num_steps}",
        "ended": str(summary.extra["ended"]),
        "time": phase_line(summary.seconds_by_phase, summary.seconds_total),
        "metrics": f"{_from_here(logs / 'metrics.jsonl')}{curves}",
    }
    if summary.peak_memory_bytes_by_phase:
        rows["peak memory"] = memory_line(summary.peak_memory_bytes_by_phase)
    if (folder / "rollouts").exists():
        rows["rollouts"] = _from_here(folder / "rollouts")
    if config.checkpointing.enabled and run.saved_step:
        rows["checkpoint"] = _from_here(run.checkpoints.path(run.saved_step))
    if export is not None and config.checkpointing.export_hf:
        rows["model"] = f"{_from_here(export)}  (loads with transformers.{config.exported_as})"
    if config.checkpointing.enabled:
        given = command or ("nemo-rl", config.algorithm, "--config", _from_here(folder / "config.yaml"))
        rows["to continue"] = _continuation(given, {} if export is None else _next_limits(config, run))
    return rows


def _tokens_per_second(run: Run, timer: PhaseTimer) -> float:
    """Tokens of the loop over the seconds of its phases."""
    seconds = sum(timer.seconds.get(name, 0.0) for name in ("generate", "logprobs", "train"))
    return run.num_tokens / seconds if seconds else 0.0


def _validation(figures: Mapping[str, float]) -> dict[str, float]:
    """What a person looks at of a validation."""
    return {name: figures[f"val/{name}"] for name in ("loss", "accuracy") if f"val/{name}" in figures}


def _next_limits(config: RunConfig, run: Run) -> dict[str, int]:
    """Twice the limits that ended a finished run, by their keys."""
    section, loop = config.algorithm, config.loop
    limits = {f"{section}.max_num_steps": (run.step, loop.max_num_steps)}
    if loop.max_num_epochs is not None:
        limits[f"{section}.max_num_epochs"] = (run.info.epochs, loop.max_num_epochs)
    if loop.early_stopping.patience is not None:
        limits[f"{section}.early_stopping.patience"] = (run.info.num_worse, loop.early_stopping.patience)
    return {key: 2 * done for key, (done, limit) in limits.items() if done >= limit}


def _continuation(command: Sequence[str], changed: Mapping[str, int]) -> str:
    """The same command with changed settings, ready for a shell."""
    here = f"{Path.cwd()}/"
    kept = [word.removeprefix(here) for word in command if word.lstrip("+").partition("=")[0] not in changed]
    return shlex.join([*kept, *(f"{key}={value}" for key, value in changed.items())])


def _from_here(path: Path) -> str:
    """A path as one types it in the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
