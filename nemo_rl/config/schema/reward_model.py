"""The configuration of reward-model training."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from nemo_rl.config.schema.run import ExampleRunConfig, LoopConfig, check_room_for_pairs


class RewardModelLoopConfig(LoopConfig):
    """The Bradley-Terry loss, and steps, validation and seed of the loop."""

    margin_scale: Annotated[float, Field(ge=0)] = 0.0
    """Ask for a distance between two scores of this many times the margin that the data state; 0 takes no notice."""

    centering_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared sum of a pair's scores, which holds their mean to 0; 0.01 is usual, 0 leaves it free."""


class RMConfig(ExampleRunConfig):
    """A run that trains a reward model."""

    default_recipe: ClassVar[str] = "rm_arithmetic_smollm2"
    algorithm: ClassVar[str] = "rm"
    exported_as: ClassVar[str] = "AutoModelForSequenceClassification"

    rm: RewardModelLoopConfig = RewardModelLoopConfig()
    """The Bradley-Terry loss, and steps, validation and seed of the loop."""

    @property
    def loop(self) -> LoopConfig:
        """The section `rm`."""
        return self.rm

    @model_validator(mode="after")
    def _pairs_fit(self) -> Self:
        check_room_for_pairs(self)
        return self
