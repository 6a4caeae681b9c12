"""The configuration of supervised fine-tuning."""

from typing import ClassVar

from nemo_rl.config.schema.run import ExampleRunConfig, LoopConfig


class SFTConfig(ExampleRunConfig):
    """A run of supervised fine-tuning."""

    default_recipe: ClassVar[str] = "sft_arithmetic_smollm2"
    algorithm: ClassVar[str] = "sft"

    sft: LoopConfig = LoopConfig()
    """Steps, validation and seed of the loop."""

    @property
    def loop(self) -> LoopConfig:
        """The section `sft`."""
        return self.sft
