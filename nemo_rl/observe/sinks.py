"""Where the figures of a run go: a JSON-lines file always, TensorBoard, Weights & Biases and MLflow on request."""

import json
import math
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol

from nemo_rl.atomic import write_text_atomically
from nemo_rl.config.schema.logging import LoggerConfig
from nemo_rl.errors import DependencyError


class Sink(Protocol):
    """Takes the figures of one step; may raise, the `RunLogger` copes."""

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Sequence[float]]) -> None: ...
    def close(self) -> None: ...


def complete_lines(path: Path) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Yield every whole line of a metrics file and what it says; a line torn by a killed writer is passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and "step" in record:
                yield line, record


class JsonlSink:
    """Appends one JSON object per call, `{"step": 3, "reward": 0.5, ...}`; a figure that is not finite is null.

    Opening it for a run that goes on at `first_step` drops the lines of that step and later ones, so that the file of a
    resumed run equals that of an uninterrupted one. Lines reach the operating system one by one: killing the process
    loses none.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, *, first_step: int = 0) -> None:
        kept = "".join(line for line, record in complete_lines(path) if (record["step"] or 0) < first_step)
        write_text_atomically(path, kept)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Sequence[float]]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Writes TensorBoard events into `folder`; on resume, events of `first_step` and later are hidden."""

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Sequence[float]]) -> None:
        import torch

        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        for name, values in histograms.items():
            if values:
                self._writer.add_histogram(name, torch.tensor(values, dtype=torch.float64), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Logs to Weights & Biases; a resumed run continues the same W&B run, whose id is kept in `folder`.

    Raises:
        DependencyError: wandb is not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        name: str | None = None,
        config: Mapping[str, object] | None = None,
        first_step: int = 0,
    ) -> None:
        self._wandb = _optional("wandb")
        kept = folder / "wandb_run_id"
        if first_step == 0 or not kept.exists():
            write_text_atomically(kept, secrets.token_hex(4))
        self._run = self._wandb.init(
            project=project,
            name=name,
            dir=str(folder),
            config=dict(config or {}),
            id=kept.read_text(encoding="utf-8"),
            resume="allow",
        )

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Sequence[float]]) -> None:
        charts = {name: self._wandb.Histogram(list(values)) for name, values in histograms.items() if values}
        # A histogram takes the place of its mean: one name holds one kind of value in W&B.
        self._run.log({**scalars, **charts}, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """Logs scalars to MLflow; a resumed run continues the same MLflow run, whose id is kept in `folder`.

    Raises:
        DependencyError: mlflow is not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        experiment_name: str,
        run_name: str | None = None,
        tracking_uri: str | None = None,
        first_step: int = 0,
    ) -> None:
        mlflow = _optional("mlflow")
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient(tracking_uri=tracking_uri)
        kept = folder / "mlflow_run_id"
        if first_step == 0 or not kept.exists():
            experiment = self._client.get_experiment_by_name(experiment_name)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(experiment_name)
            run = self._client.create_run(experiment_id, run_name=run_name)
            write_text_atomically(kept, run.info.run_id)
        self._run_id = kept.read_text(encoding="utf-8")

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Sequence[float]]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in scalars.items() if math.isfinite(value)]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def log_folder(config: LoggerConfig, run_folder: Path) -> Path:
    """Where the figures of a run are: `config.log_dir`, or else the run's folder."""
    return Path(config.log_dir).expanduser().absolute() if config.log_dir else run_folder


def build_sinks(
    config: LoggerConfig, run_folder: Path, *, first_step: int = 0, resolved: Mapping[str, object] | None = None
) -> list[Sink]:
    """Open the sinks that `config` asks for, in `log_folder`.

    Args:
        config: the section `logger`.
        run_folder: folder of the run; its name is the run's where the configuration gives none.
        first_step: the first step that will be logged; records of it and later ones are replaced.
        resolved: the whole configuration, shown by services that keep it beside the figures.

    Raises:
        DependencyError: a service is asked for and its package is not installed.
        OSError: the folder cannot be written.
    """
    folder = log_folder(config, run_folder)
    sinks: list[Sink] = [JsonlSink(folder / "metrics.jsonl", first_step=first_step)]
    if config.tensorboard_enabled:
        sinks.append(TensorBoardSink(folder / "tensorboard", first_step=first_step))
    if config.wandb_enabled:
        project, name = config.wandb.project, config.wandb.name or run_folder.name
        sinks.append(WandbSink(folder, project=project, name=name, config=resolved, first_step=first_step))
    if config.mlflow_enabled:
        experiment, name, uri = config.mlflow.experiment_name, config.mlflow.run_name, config.mlflow.tracking_uri
        name = name or run_folder.name
        sinks.append(
            MlflowSink(folder, experiment_name=experiment, run_name=name, tracking_uri=uri, first_step=first_step)
        )
    return sinks


def _optional(package: str) -> ModuleType:
    """Import an optional package, whose extra bears its name."""
    try:
        return import_module(package)
    except ImportError as error:
        raise DependencyError(
            f"logger.{package}_enabled needs the package {package}, which is not installed: "
            f"run `uv sync --extra {package}` or `pip install 'nemo-rl[{package}]'`."
        ) from error
