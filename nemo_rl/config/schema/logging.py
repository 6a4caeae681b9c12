"""Sections `logger` and `checkpointing`: what a run leaves behind."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nemo_rl.config.schema.base import NonNegativeInt, PositiveInt, Section, conflict


class WandbConfig(Section):
    """Weights & Biases."""

    project: str = "nemo-rl"
    """Project of the run."""

    name: str | None = None
    """Name of the run; None is the name of the run's folder."""


class MlflowConfig(Section):
    """MLflow."""

    experiment_name: str = "nemo-rl"
    """Experiment of the run."""

    run_name: str | None = None
    """Name of the run; None is the name of the run's folder."""

    tracking_uri: str | None = None
    """Tracking server or folder; None is MLflow's own default."""


class LoggerConfig(Section):
    """Where metrics and samples go; `metrics.jsonl` is always written."""

    log_dir: str | None = None
    """Folder of the logs; None is the run's folder."""

    tensorboard_enabled: bool = True
    """Write TensorBoard events."""

    wandb_enabled: bool = False
    """Send metrics to Weights & Biases."""

    mlflow_enabled: bool = False
    """Send metrics to MLflow."""

    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""

    mlflow: MlflowConfig = MlflowConfig()
    """MLflow."""

    num_val_samples_to_print: NonNegativeInt = 0
    """Validation samples shown at every validation."""

    print_sample_period: NonNegativeInt = 5
    """Show one training sample every so many steps; 0 never does."""


class CheckpointingConfig(Section):
    """When the run is saved, what is kept, and how it continues."""

    enabled: bool = True
    """Save checkpoints."""

    checkpoint_dir: str = "results/grpo"
    """Folder of the run: configuration, metrics, rollouts, checkpoints and the exported model."""

    metric_name: str | None = "val:accuracy"
    """Metric that ranks the checkpoints, as `train:NAME` or `val:NAME`; None keeps the latest ones."""

    higher_is_better: bool = True
    """Whether a checkpoint with a higher metric is the better one."""

    keep_top_k: PositiveInt | None = 3
    """How many of the best checkpoints to keep; the latest is kept whether or not it is one of them. None keeps all."""

    save_period: PositiveInt = 10
    """Save every so many steps, and at the end."""

    checkpoint_must_save_by: Annotated[str, Field(pattern=r"^\d+:[0-2]?\d:[0-5]?\d:[0-5]?\d$")] | None = None
    """Wall-clock time after the start, as `DD:HH:MM:SS`, at which the run saves and stops; None never does."""

    async_save: bool = False
    """Copy the training state to host memory and write it while training goes on. A checkpoint gets its name when all
    of it is written, before the next save and before the end of the run."""

    export_hf: bool = True
    """Write a Hugging Face model folder at the end."""

    resume: Literal["auto", "never"] = "auto"
    """`auto` continues from the latest checkpoint in the folder; `never` refuses a folder that has one."""

    @property
    def must_save_by_seconds(self) -> float | None:
        """`checkpoint_must_save_by` in seconds."""
        if self.checkpoint_must_save_by is None:
            return None
        days, hours, minutes, seconds = map(int, self.checkpoint_must_save_by.split(":"))
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)

    @model_validator(mode="after")
    def _metric_has_a_prefix(self) -> Self:
        if self.metric_name is not None and not self.metric_name.startswith(("train:", "val:")):
            raise conflict("metric_name must start with 'train:' or 'val:'", "metric_name")
        return self
