"""The checkpoints of a run: `step_N/` folders that are whole or not there, the best few and always the latest."""

import difflib
import json
import logging
import math
import re
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from nemo_rl.atomic import atomic_folder, recover_folders
from nemo_rl.config.schema.logging import CheckpointingConfig
from nemo_rl.errors import CheckpointError

_log = logging.getLogger(__name__)
_INFO, _LOADER, _POLICY = "training_info.json", "train_dataloader.pt", "policy"


class Stateful(Protocol):
    """Saves itself to a folder, in the background if asked to, and restores itself from one."""

    def save(self, folder: Path, *, in_background: bool = False) -> None: ...
    def finish_save(self, *, wait: bool = True) -> bool:
        """Whether what `save` began is written; raises what it failed with. With `wait`, return when it is."""
        ...

    def load(self, folder: Path) -> None: ...


class Trainable(Stateful, Protocol):
    """Has weights; `describe()["optimizer_steps"]` counts every change of them that was begun."""

    def describe(self) -> Mapping[str, Any]: ...


class Positioned(Protocol):
    """Knows its place in the data."""

    def state_dict(self) -> dict[str, Any]: ...


class LoaderState(Positioned, Protocol):
    """Can also be put back to a place."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class TrainingInfo:
    """What a checkpoint says about itself in `training_info.json`.

    Attributes:
        step: steps done.
        metrics: figures of that step by `train/NAME` and `val/NAME`; one of them ranks the checkpoint.
        before: what the model could do before the first step, by `SET/FIGURE` (`test/accuracy`, `val/loss`), so that a
            resumed run need not measure again.
        epochs: whole passes over the data done.
        best: the best validation so far, by the name of the metric that early stopping watches.
        num_worse: validations since then.
    """

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    before: Mapping[str, float] = field(default_factory=dict)
    epochs: int = 0
    best: Mapping[str, float] = field(default_factory=dict)
    num_worse: int = 0


@dataclass(frozen=True, slots=True)
class _Unnamed:
    """A checkpoint that does not have its name yet.

    Attributes:
        folder: which it will be.
        parts: that are being written.
        naming: closes its `atomic_folder`, which names it.
    """

    folder: Path
    parts: Sequence[Trainable]
    naming: ExitStack


class Checkpoints:
    """Reads and writes the checkpoints in the run's folder.

    Each holds the policy in `policy/`, and what else is trained, such as a critic, in a folder by its name.
    """

    def __init__(self, config: CheckpointingConfig, config_yaml: str) -> None:
        self._config = config
        self._warned = False
        self._others: dict[str, Trainable] = {}
        self._unnamed: _Unnamed | None = None
        self.config_yaml = config_yaml
        self.folder = Path(config.checkpoint_dir).expanduser().absolute()

    def open_folder(self) -> None:
        """Make the run's folder and put back what a kill left half done.

        Raises:
            CheckpointError: the folder cannot be written, or `resume` is `never` and it holds a checkpoint.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.touch()
            probe.unlink()
            recover_folders(self.folder, "step_*")
        except OSError as error:
            raise CheckpointError(
                f"cannot write to the run folder {self.folder} ({error.strerror}); "
                "set checkpointing.checkpoint_dir to another"
            ) from error
        steps = self.steps()
        if steps and self._config.resume == "never":
            raise CheckpointError(
                f"{self.folder} already holds a run at step {steps[-1]} and checkpointing.resume is never; "
                "choose another checkpointing.checkpoint_dir or set resume to auto"
            )

    def include(self, name: str, part: Trainable) -> None:
        """From now on save and resume a trained part beside the policy, in the folder `name` of each checkpoint."""
        self._others[name] = part

    def optimizer_steps(self, policy: Trainable) -> dict[str, int]:
        """How many changes of weights were begun, by the name of the trained part."""
        return {name: part.describe()["optimizer_steps"] for name, part in self._parts(policy).items()}

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        found = (re.fullmatch(r"step_(\d+)", path.name) for path in self.folder.glob("step_*"))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step_{step}"

    def info(self, step: int) -> TrainingInfo:
        """Read what the checkpoint of a step says about itself.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        path = self.path(step) / _INFO
        try:
            return TrainingInfo(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} is missing or damaged ({error}); delete {path.parent} to resume earlier"
            ) from error

    def latest(self) -> TrainingInfo:
        """Read what the latest checkpoint says about itself; without one the step is 0.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        steps = self.steps()
        return self.info(steps[-1]) if steps else TrainingInfo(0)

    def resume(self, policy: Trainable, loader: LoaderState) -> TrainingInfo:
        """Restore the trained parts and the data position from the latest checkpoint.

        Without one, nothing happens and the step is 0.

        Raises:
            CheckpointError: it is damaged, or of another model or data set.
        """
        info = self.latest()
        if info.step == 0:
            return info
        folder = self.path(info.step)
        for name, part in self._parts(policy).items():
            part.load(folder / name)
        try:
            state = torch.load(folder / _LOADER, weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{folder / _LOADER} is missing or damaged ({error}); delete {folder} to resume earlier"
            ) from error
        loader.load_state_dict(state)
        return info

    def save(self, info: TrainingInfo, policy: Trainable, loader: Positioned) -> Path:
        """Write the checkpoint of a step, whole or not at all, then remove what need not be kept.

        With `async_save` it is only begun, and there once `finish` says so; the one before is finished first.

        Raises:
            CheckpointError: it, or the one before, cannot be written; earlier checkpoints are untouched.
        """
        self.finish()
        folder, parts, later = self.path(info.step), self._parts(policy), self._config.async_save
        with _writing(folder), ExitStack() as naming:
            work = naming.enter_context(atomic_folder(folder))
            (work / _INFO).write_text(json.dumps(asdict(replace(info, metrics=_finite(info.metrics))), indent=2))
            (work / "config.yaml").write_text(self.config_yaml)
            torch.save(loader.state_dict(), work / _LOADER)
            for name, part in parts.items():
                part.save(work / name, in_background=later)
            self._unnamed = _Unnamed(folder, tuple(parts.values()), naming.pop_all())
        if not later:
            self.finish()
        return folder

    def finish(self, *, wait: bool = True) -> None:
        """Give the checkpoint that is being written its name; without `wait`, only if all of it is there already.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        if self._unnamed is None:
            return
        unnamed, self._unnamed = self._unnamed, None
        with _writing(unnamed.folder), unnamed.naming as naming:
            if not _finish_all(unnamed.parts, wait=wait):
                self._unnamed = replace(unnamed, naming=naming.pop_all())
                return
        self._prune()

    def _parts(self, policy: Trainable) -> dict[str, Trainable]:
        return {_POLICY: policy, **self._others}

    def _prune(self) -> None:
        """Keep the latest checkpoint and the best `keep_top_k`; without the ranking metric a checkpoint ranks last."""
        steps = self.steps()
        if self._config.keep_top_k is None or len(steps) <= self._config.keep_top_k:
            return
        ranks = {step: self._rank(step) for step in steps}
        if self._config.metric_name is not None and not self._warned and max(ranks.values()) == -math.inf:
            self._warned = True
            _log.warning(
                "no checkpoint has the figure checkpointing.metric_name=%s, so the latest ones are kept; %s",
                self._config.metric_name,
                self._advice(steps[-1], self._config.metric_name),
            )
        ranked = sorted(steps, key=lambda step: (ranks[step], step), reverse=True)
        for step in set(ranked[self._config.keep_top_k :]) - {steps[-1]}:
            unwanted = self.path(step).rename(self.path(step).with_name(f"tmp_step_{step}"))
            shutil.rmtree(unwanted, ignore_errors=True)  # after a kill here, `recover_folders` removes the rest
            _log.debug("removed checkpoint %d", step)

    def _advice(self, step: int, name: str) -> str:
        known = [figure.replace("/", ":", 1) for figure in self.info(step).metrics]
        if close := difflib.get_close_matches(name, known, n=1):
            return f"did you mean {close[0]}?"
        return "val:NAME needs a validation (val_period), train:NAME is any of metrics.jsonl"

    def _rank(self, step: int) -> float:
        name = (self._config.metric_name or "").replace(":", "/", 1)
        try:
            value = self.info(step).metrics.get(name)
        except CheckpointError:
            return -math.inf
        if value is None or math.isnan(value):
            return -math.inf
        return value if self._config.higher_is_better else -value


def _finish_all(parts: Sequence[Trainable], *, wait: bool) -> bool:
    """Ask every part, also after one has failed: none may still write into a folder that is about to go."""
    failures: list[Exception] = []
    done = True
    for part in parts:
        try:
            done &= part.finish_save(wait=wait or bool(failures))
        except Exception as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return done


@contextmanager
def _writing(folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint {folder} ({error}); free space or choose another folder"
        ) from error


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
