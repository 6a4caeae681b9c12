"""The configuration of supervised fine-tuning."""

from typing import ClassVar

from nemo_rl.config.schema.run import ExampleLoopConfig, ExampleRunConfig


class SFTConfig(ExampleRunConfig):
    """A run of supervised fine-tuning."""

    default_recipe: ClassVar[str] = "sft_arithmetic_smollm2"
    algorithm: ClassVar[str] = "sft"

    sft: ExampleLoopConfig = ExampleLoopConfig()
    """Steps, validation and seed of the loop."""

    @property
    def loop(self) -> ExampleLoopConfig:
        """The section `sft`."""
        return self.sft
