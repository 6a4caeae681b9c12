"""`Run`: everything around a loop that is not the algorithm. It counts steps, logs, validates and saves."""

import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

from nemo_rl.algorithms.checkpoints import Checkpoints, Positioned, Trainable, TrainingInfo
from nemo_rl.algorithms.ending import after_validation, end_of
from nemo_rl.config.schema.run import RunConfig
from nemo_rl.data.types import RolloutGroup
from nemo_rl.errors import CheckpointError, DataError
from nemo_rl.metrics import Metrics, Sum, prefixed, scalars
from nemo_rl.observe.console import Console, Sample
from nemo_rl.observe.logger import RunLogger
from nemo_rl.observe.summary import PhaseTimer
from nemo_rl.rollouts.collect import Collected

type Validate = Callable[[], tuple[Metrics, list[RolloutGroup]]]
"""Figures of the validation set, and the answers they were measured on if there are any."""


class Records(Positioned, Protocol):
    """Counts whole passes over the data."""

    @property
    def epoch(self) -> int: ...


_SHOWN = {
    "train/reward/mean": "reward",
    "train/environment/accuracy": "accuracy",
    "train/nll": "loss",
    "train/forward_kl": "forward KL",
    "train/reverse_kl": "reverse KL",
    "train/preference_loss": "loss",
    "train/accuracy": "accuracy",
}
"""What a person looks at while a run is going on, by its name in the records."""


@dataclass(frozen=True, slots=True)
class WholeStep:
    """The state at the end of a step, to be saved if a later one fails.

    Attributes:
        policy: holds the weights, unless it or another trained part has begun to change its own since.
        optimizer_steps: that each part had begun by then.
        position: of the loader, before it drew what the next step failed on.
    """

    policy: Trainable
    optimizer_steps: Mapping[str, int]
    position: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """The loader's, as it was."""
        return self.position


class Run:
    """The context of one run, between the loop and the outside world.

    Ctrl-C lets the step at hand finish, saves and ends the loop; a second one stops at once. When a step fails, the one
    before it is saved, so that the run can go on there.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        checkpoints: Checkpoints,
        logger: RunLogger,
        console: Console,
        timer: PhaseTimer,
        info: TrainingInfo,
    ) -> None:
        self._config = config
        self._logger = logger
        self._timer = timer
        self._deadline = config.checkpointing.must_save_by_seconds
        self._handler: signal.Handlers | Callable[[int, FrameType | None], object] | int | None = None
        self._before_step: dict[str, float] = {}
        self._longest_step = 0.0
        self._step_began = time.monotonic()
        self._ending = False
        self._unsaved: WholeStep | None = None
        self.checkpoints = checkpoints
        self.console = console
        self.info = info
        self.interrupted = False
        self._end: str | None = None
        self.num_tokens = 0.0
        self.saved_step = info.step
        self.step = info.step

    def __enter__(self) -> Self:
        """Take over Ctrl-C, which is the main thread's alone."""
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After a failure save the last whole step; give Ctrl-C back and close the logs."""
        try:
            if isinstance(error, Exception):
                self._rescue(error)
        finally:
            if self._handler is not None:
                signal.signal(signal.SIGINT, self._handler)
            self._logger.close()

    def _rescue(self, failure: Exception) -> None:
        """Save a step after the next one failed; whatever goes wrong here must not hide that failure."""
        whole, step = self._unsaved, self.saved_step
        try:
            self.checkpoints.finish()
            if whole is None:
                return
            step = self.step
            if self.checkpoints.optimizer_steps(whole.policy) != whole.optimizer_steps:
                raise CheckpointError("the step that failed had begun to change the weights")
            self._save(whole.policy, whole)
            self.checkpoints.finish()
            goes_on = "" if isinstance(failure, DataError) else ": the same command goes on after it"
            self.console.note(f"step {self.step} is saved{goes_on}")
        except Exception as error:
            self.console.note(f"step {step} cannot be saved: {error}")

    def _save(self, policy: Trainable, loader: Positioned) -> None:
        self._unsaved = None  # if this fails, so would another try
        with self.phase("save"):
            self.checkpoints.save(self.info, policy, loader)
        self.saved_step = self.info.step

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        with suppress(RuntimeError):  # Python forbids a write within a write to the same stream
            self.console.note("stopping: the step at hand is finished and saved first; Ctrl-C again stops at once")

    def begin(self, validate: Validate) -> None:
        """Validate before the first step, where the configuration asks for it."""
        if self.step == 0 and self._config.loop.val_at_start:
            self.validate(0, validate)
            self.info = replace(self.info, before={**self.info.before, **self.info.metrics})

    def steps(self, loader: Records) -> Iterator[int]:
        """Count the steps still to do, from 1; ends when steps, epochs or time are used up, or on Ctrl-C."""
        self._step_began = time.monotonic()
        self.console.begin_steps()
        self._decide(loader)
        while not self._ending:
            self._before_step = self._timer.seconds
            self._step_began = time.monotonic()
            yield self.step + 1
            self._longest_step = max(self._longest_step, time.monotonic() - self._step_began)

    def _decide(self, loader: Records) -> None:
        """Settle whether another step follows; only before a step is saved, so that the last one always is."""
        self.info = replace(self.info, epochs=loader.epoch)
        self._end = end_of(self._config.loop, self.info)
        longest_step = max(self._longest_step, time.monotonic() - self._step_began)
        out_of_time = self._deadline is not None and self._timer.total + longest_step > self._deadline
        self._ending = self.finished or out_of_time or self.interrupted

    @property
    def finished(self) -> bool:
        """Whether nothing was left to do, and nobody stopped the run before it found so."""
        return self._end is not None and not self.interrupted

    @property
    def why_ended(self) -> str:
        """Why the loop is over, in words."""
        if self.interrupted:
            return "it was interrupted"
        return self._end or "checkpointing.checkpoint_must_save_by left no time for another step"

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Count and show the time of a phase."""
        with self._timer.phase(name), self.console.phase(name):
            yield

    def end_step(
        self, step: int, metrics: Metrics, collected: Collected | None = None, advantages: Sequence[float] | None = None
    ) -> None:
        """Log and show the figures of a step, and its rollouts if it has any."""
        self.step, self._unsaved = step, None
        elapsed = time.monotonic() - self._step_began
        seconds = {name: total - self._before_step.get(name, 0.0) for name, total in self._timer.seconds.items()}
        num_tokens = metrics["train/tokens" if collected is None else "train/tokens_sampled"].value
        self.num_tokens += num_tokens
        timing: Metrics = {f"timing/{name}_seconds": Sum(value) for name, value in seconds.items() if value > 0}
        if collected is not None:
            timing["timing/environment_seconds"] = Sum(collected.environment_seconds)
        timing["timing/step_seconds"] = Sum(elapsed)
        timing["timing/tokens_per_second"] = Sum(num_tokens / elapsed)
        worked_on = {"train": "train/tokens"}
        if collected is not None:  # the log-probabilities of given answers may be known already
            worked_on |= {"generate": "train/tokens_sampled", "logprobs": "train/tokens"}
        for phase, tokens in worked_on.items():
            if tokens in metrics and seconds.get(phase):
                timing[f"timing/{phase}_tokens_per_second"] = Sum(metrics[tokens].value / seconds[phase])
        self._logger.log(step, metrics | timing)
        if collected is not None:
            self._logger.log_rollouts(step, collected.groups, advantages)
        figures = scalars(metrics)
        self.info = replace(self.info, step=step, metrics=figures)
        self.console.step(
            step,
            figures={label: figures[name] for name, label in _SHOWN.items() if name in figures},
            tokens_per_second=num_tokens / elapsed,
            sample=None if collected is None else _sample(collected.groups[0]),
        )

    def keep(self, step: int, policy: Trainable, loader: Records, *, validate: Validate) -> None:
        """Validate and save after a step, where the configuration or the end of the run asks for it."""
        limits, saving = self._config.loop, self._config.checkpointing
        self._decide(loader)
        if saving.enabled:
            self._unsaved = WholeStep(policy, self.checkpoints.optimizer_steps(policy), loader.state_dict())
        if (limits.val_period and step % limits.val_period == 0) or (self._ending and limits.val_at_end):
            self.validate(step, validate)
            self._decide(loader)  # meanwhile Ctrl-C may have come
        self.checkpoints.finish(wait=False)
        if saving.enabled and (step % saving.save_period == 0 or self._ending):
            self._save(policy, loader)
            self._ending = self._ending or self.interrupted  # nothing is left to finish
        if saving.enabled and self._ending:
            with self.phase("save"):
                self.checkpoints.finish()

    def validate(self, step: int, validate: Validate) -> None:
        """Measure the validation set and log it."""
        with self.phase("validate"):
            metrics, groups = validate()
        named = prefixed("val", metrics)
        self._logger.log(step, named)
        self.info = replace(self.info, metrics={**self.info.metrics, **scalars(named)})
        self.info = after_validation(self.info, self._config.loop.early_stopping, scalars(metrics))
        known = {name: metrics[name].value for name in ("loss", "accuracy") if name in metrics}
        told = ", ".join(f"{name} {value:.3f}" for name, value in known.items())
        self.console.note(f"step {step}: validation {told or 'accuracy unknown'}")
        for group in groups[: self._config.logger.num_val_samples_to_print]:
            sample = _sample(group)
            self.console.note(f"  {sample.problem!r} -> {sample.reply!r} (reward {sample.reward:g})")

    def log_outcome(self, name: str, value: float) -> None:
        """Log a figure of the whole run at the current step."""
        self._logger.log(self.step, {name: Sum(value)})


def _sample(group: RolloutGroup) -> Sample:
    """The first rollout of a group, for people."""
    rollout = group.rollouts[0]
    return Sample(
        problem=group.task.messages[-1]["content"],
        reply=rollout.messages[-1]["content"] if rollout.messages else "",
        expected=str(group.task.extra.get("ground_truth", "")),
        reward=rollout.reward,
    )
