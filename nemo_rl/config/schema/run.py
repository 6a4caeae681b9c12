"""What the configurations of all training runs have in common."""

from abc import abstractmethod
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from nemo_rl.config.schema.base import CommandConfig, NonNegativeInt, PositiveInt, Section, conflict
from nemo_rl.config.schema.cluster import ClusterConfig
from nemo_rl.config.schema.examples import ExampleDataConfig
from nemo_rl.config.schema.logging import CheckpointingConfig, LoggerConfig
from nemo_rl.config.schema.policy import TrainedPolicyConfig


class EarlyStoppingConfig(Section):
    """When a run ends because it gets no better."""

    patience: PositiveInt | None = None
    """End the run after so many validations in a row that were no improvement; None never does."""

    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """An improvement beats the best validation so far by more than this."""

    metric_name: Annotated[str, Field(pattern="^val:.+$")] = "val:accuracy"
    """Metric of the validation that is watched, as `val:NAME`."""

    higher_is_better: bool = True
    """Whether a higher metric is the better one."""


class LoopConfig(Section):
    """What every loop has: its end, its validations and its seed."""

    max_num_steps: PositiveInt = 40
    """Steps of the run."""

    max_num_epochs: PositiveInt | None = None
    """Passes over the data after which the run ends even if steps are left; None has no such limit."""

    val_period: NonNegativeInt = 0
    """Validate every so many steps; 0 never does."""

    val_at_start: bool = False
    """Validate before the first step."""

    val_at_end: bool = False
    """Validate after the last step."""

    max_val_samples: PositiveInt = 256
    """Most records of one validation."""

    seed: NonNegativeInt = 42
    """Decides the order of the data and every random draw."""

    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    """When the run ends because it gets no better."""

    @property
    def validates(self) -> bool:
        """Whether the run validates at all."""
        return bool(self.val_period) or self.val_at_start or self.val_at_end

    @model_validator(mode="after")
    def _can_stop_early(self) -> Self:
        if self.early_stopping.patience is not None and not self.val_period:
            raise conflict(
                f"early_stopping.patience = {self.early_stopping.patience} counts validations and val_period = 0 makes"
                " none while the run goes on: set val_period",
                "early_stopping.patience",
                "val_period",
            )
        return self


class RunConfig(CommandConfig):
    """A training run."""

    algorithm: ClassVar[str]
    """Name of the command and of the section with the loop."""

    exported_as: ClassVar[str] = "AutoModelForCausalLM"
    """The class of Transformers that loads the exported model."""

    policy: TrainedPolicyConfig
    """The model, and how it is trained."""

    checkpointing: CheckpointingConfig = CheckpointingConfig()
    """When the run is saved, what is kept, and how it continues."""

    logger: LoggerConfig = LoggerConfig()
    """Where metrics and samples go."""

    cluster: ClusterConfig = ClusterConfig()
    """Where the workers run and what they may use."""

    @property
    @abstractmethod
    def loop(self) -> LoopConfig:
        """The algorithm's own section."""

    @property
    def num_models(self) -> int:
        """Models that are computed with, in turns, each in a worker of its own."""
        return 1

    @property
    def compares_policies(self) -> bool:
        """Whether probabilities under the trained weights are compared with those under others."""
        return False

    @model_validator(mode="after")
    def _policies_compare(self) -> Self:
        if self.compares_policies and self.policy.dtensor_cfg.lora_cfg.dropout:
            raise conflict(
                f"{self.algorithm} compares probabilities under two sets of weights, which dropout would change at"
                " random: set policy.dtensor_cfg.lora_cfg.dropout to 0",
                "policy.dtensor_cfg.lora_cfg.dropout",
            )
        return self

    @model_validator(mode="after")
    def _device_is_there(self) -> Self:
        if self.policy.device == "cuda" and self.cluster.executor == "ray" and self.cluster.gpus_per_node == 0:
            raise conflict(
                "policy.device = cuda needs a GPU, and cluster.gpus_per_node = 0 asks Ray for none: set the second to 1"
                " or the first to cpu",
                "policy.device",
                "cluster.gpus_per_node",
            )
        return self


class LossEarlyStoppingConfig(EarlyStoppingConfig):
    """When a run ends because it gets no better."""

    metric_name: Annotated[str, Field(pattern="^val:.+$")] = "val:loss"
    """Metric of the validation that is watched, as `val:NAME`."""

    higher_is_better: bool = False
    """Whether a higher metric is the better one."""


class ExampleLoopConfig(LoopConfig):
    """Steps, validation and seed of a loop that learns from given answers."""

    early_stopping: LossEarlyStoppingConfig = (  # pyright: ignore[reportIncompatibleVariableOverride]  # it is frozen
        LossEarlyStoppingConfig()
    )
    """When the run ends because it gets no better."""


class LossCheckpointingConfig(CheckpointingConfig):
    """When the run is saved, what is kept, and how it continues."""

    metric_name: str | None = "val:loss"
    """Metric that ranks the checkpoints, as `train:NAME` or `val:NAME`; None keeps the latest ones."""

    higher_is_better: bool = False
    """Whether a checkpoint with a higher metric is the better one."""


class ExampleRunConfig(RunConfig):
    """A run that learns from given answers."""

    checkpointing: LossCheckpointingConfig = (  # pyright: ignore[reportIncompatibleVariableOverride]  # it is frozen
        LossCheckpointingConfig()
    )
    """When the run is saved, what is kept, and how it continues."""

    data: ExampleDataConfig
    """Answers to learn from, and how they become tokens."""

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence that is trained on."""
        return self.data.max_input_seq_length or self.policy.max_total_sequence_length

    @model_validator(mode="after")
    def _can_validate(self) -> Self:
        if self.loop.validates and self.data.validation is None and not self.data.split_validation_size:
            name = self.algorithm
            raise conflict(
                f"the run validates but data.validation is not set: set it or data.split_validation_size, or turn off"
                f" {name}.val_period, val_at_start and val_at_end",
                f"{name}.val_period",
            )
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if self.max_sequence_tokens > self.policy.max_total_sequence_length:
            raise conflict(
                f"data.max_input_seq_length = {self.max_sequence_tokens} exceeds policy.max_total_sequence_length ="
                f" {self.policy.max_total_sequence_length}: lower the first or raise the second",
                "data.max_input_seq_length",
                "policy.max_total_sequence_length",
            )
        return self


def check_room_for_pairs(config: ExampleRunConfig) -> None:
    """Refuse a token budget into which a pair of full length does not fit, because pairs are never divided."""
    pair = 2 * config.max_sequence_tokens
    if config.policy.train_mb_tokens < pair:
        raise conflict(
            f"policy.train_mb_tokens = {config.policy.train_mb_tokens} has no room for both answers of a pair, which"
            f" may have {pair} tokens: raise it to {pair} or lower policy.max_total_sequence_length",
            "policy.train_mb_tokens",
            "policy.max_total_sequence_length",
        )
