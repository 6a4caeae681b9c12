"""What runs have in common whose answers are sampled from the policy and judged: GRPO, PPO, distillation."""

from abc import abstractmethod
from typing import Annotated, Self

from pydantic import Field, model_validator

from nemo_rl.config.schema.base import PositiveFloat, PositiveInt, Share, conflict
from nemo_rl.config.schema.data import DataConfig, JudgedTasksConfig, RecordsConfig, parts_of
from nemo_rl.config.schema.environments import EnvironmentConfig
from nemo_rl.config.schema.policy import PolicyConfig
from nemo_rl.config.schema.run import LoopConfig, RunConfig


class RolloutLoopConfig(LoopConfig):
    """Steps, validation and seed of the loop, and how much it samples."""

    num_prompts_per_step: PositiveInt = 8
    """Problems of one step."""

    num_generations_per_prompt: PositiveInt = 8
    """Answers to each problem: the group size G."""

    report_base_model: bool = False
    """Measure the untrained model on `data.test` with several prompts and worked examples too; the best is reported."""

    max_rollout_seconds: PositiveFloat | None = None
    """Time to judge the rollouts of a step or a validation, in seconds after the last one is sampled; a group that is
    not judged by then is dropped and counted (`dropped_groups/deadline`). None waits as long as it takes."""

    max_failed_group_share: Share = 0.5
    """Stop the run when more than this share of a step's groups is dropped."""


class SampledRunConfig(RunConfig):
    """A run that learns from answers of its own."""

    policy: PolicyConfig  # pyright: ignore[reportIncompatibleVariableOverride]  # sections are frozen
    """The model, and how it is trained and sampled."""

    data: DataConfig
    """The problems, and how they become prompts."""

    env: Annotated[dict[str, EnvironmentConfig], Field(min_length=1)]
    """The environments by name; a data set names the one that judges its tasks."""

    @property
    @abstractmethod
    def loop(self) -> RolloutLoopConfig:
        """The algorithm's own section."""

    @property
    def compares_policies(self) -> bool:
        """An answer is trained on under other weights than it was sampled from."""
        return True

    @property
    def num_rollouts_per_step(self) -> int:
        """Answers sampled in one step."""
        return self.loop.num_prompts_per_step * self.loop.num_generations_per_prompt

    @property
    def num_prompts_per_draw(self) -> int:
        """Problems drawn from the data at a time."""
        return self.loop.num_prompts_per_step

    @property
    def num_passes_per_step(self) -> int:
        """How often the rollouts of a step are trained on."""
        return 1

    @property
    def num_updates_per_step(self) -> int:
        """Optimizer steps of one step."""
        return self.num_passes_per_step * self.num_rollouts_per_step // self.policy.train_global_batch_size

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that still leaves room for a whole answer."""
        room = self.policy.max_total_sequence_length - self.policy.generation.max_new_tokens
        return self.data.max_input_seq_length or room

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        rollouts, batch = self.num_rollouts_per_step, self.policy.train_global_batch_size
        answers = self.loop.num_generations_per_prompt
        if rollouts % batch or batch % answers:
            raise conflict(
                f"a step has {self.loop.num_prompts_per_step} prompts x {answers} answers = {rollouts} rollouts, which"
                f" policy.train_global_batch_size = {batch} does not divide into equal parts of whole groups:"
                f" make it a divisor of {rollouts} and a multiple of {answers}",
                "policy.train_global_batch_size",
            )
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        total, answer = self.policy.max_total_sequence_length, self.policy.generation.max_new_tokens
        if answer >= total:
            raise conflict(
                f"policy.generation.max_new_tokens = {answer} leaves no room for a prompt in"
                f" policy.max_total_sequence_length = {total}: lower the first or raise the second",
                "policy.generation.max_new_tokens",
                "policy.max_total_sequence_length",
            )
        if self.max_prompt_tokens + answer > total:
            raise conflict(
                f"data.max_input_seq_length = {self.max_prompt_tokens} plus policy.generation.max_new_tokens = {answer}"
                f" exceeds policy.max_total_sequence_length = {total}: lower one of the first or raise the last",
                "data.max_input_seq_length",
                "policy.max_total_sequence_length",
            )
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        splits = {"train": self.data.train, "validation": self.data.validation, "test": self.data.test}
        for split, part in ((split, part) for split, spec in splits.items() for part in parts_of(spec)):
            if isinstance(part, RecordsConfig) and part.processor is not None:
                continue  # its tasks name their environment
            if isinstance(part, JudgedTasksConfig) and part.environment not in self.env:
                known = ", ".join(self.env)
                raise conflict(
                    f"data.{split}.environment = {part.environment!r} is not in env: use one of {known}",
                    f"data.{split}.environment",
                )
        if self.loop.validates and self.data.validation is None and not self.data.split_validation_size:
            raise conflict(
                "the run validates but data.validation is not set: set it or data.split_validation_size, or turn off"
                f" {self.algorithm}.val_period, val_at_start and val_at_end",
                f"{self.algorithm}.val_period",
            )
        return self
