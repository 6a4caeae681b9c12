"""The configuration of a GRPO run."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nemo_rl.config.schema.base import (
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    conflict,
)
from nemo_rl.config.schema.data import DataConfig, JudgedTasksConfig, RecordsConfig, parts_of
from nemo_rl.config.schema.environments import EnvironmentConfig
from nemo_rl.config.schema.policy import PolicyConfig
from nemo_rl.config.schema.run import LoopConfig, RunConfig


class GRPOLoopConfig(LoopConfig):
    """Group relative policy optimisation: sizes, advantages and validation of the loop."""

    num_prompts_per_step: PositiveInt = 8
    """Problems of one step."""

    num_generations_per_prompt: PositiveInt = 8
    """Answers to each problem: the group size G."""

    normalize_rewards: bool = True
    """Divide the advantages by the standard deviation of the group's rewards."""

    use_leave_one_out_baseline: bool = True
    """Compare each answer with the mean reward of the others instead of the whole group's."""

    overlong_filtering: bool = False
    """Leave answers that hit `policy.generation.max_new_tokens` out of the loss."""

    skip_uniform_groups: bool = True
    """Do not compute groups in which every advantage is zero; has no effect when the loss has a KL term."""

    report_base_model: bool = False
    """Measure the untrained model on `data.test` with several prompts and worked examples too; the best is reported."""

    max_rollout_seconds: PositiveFloat | None = None
    """Time to judge the rollouts of a step or a validation, in seconds after the last one is sampled; a group that is
    not judged by then is dropped and counted (`dropped_groups/deadline`). None waits as long as it takes."""

    max_failed_group_share: Share = 0.5
    """Stop the run when more than this share of a step's groups is dropped."""


class LossConfig(Section):
    """The clipped policy loss and its KL term."""

    ratio_clip_min: Share = 0.2
    """The probability ratio gives no gradient below 1 minus this, when the advantage is negative."""

    ratio_clip_max: PositiveFloat = 0.2
    """The probability ratio gives no gradient above 1 plus this, when the advantage is positive."""

    ratio_clip_c: Annotated[float, Field(gt=1)] | None = None
    """Dual clipping: bounds the loss of a negative advantage A at -A times this; None leaves it out."""

    reduction: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """Weight of a token: equal over the batch, equal per answer, or by a constant length (Dr. GRPO)."""

    reference_policy_kl_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL divergence to the starting weights; 0 leaves it out, and the reference model with it."""

    reference_policy_kl_type: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence (Schulman, Approximating KL divergence, 2020)."""

    kl_input_clamp_value: PositiveFloat = 20.0
    """Bound of the log-probability difference that goes into the KL estimator."""

    kl_output_clamp_value: PositiveFloat = 10.0
    """Bound of the KL estimate of one token."""


class GRPOConfig(RunConfig):
    """A GRPO run."""

    default_recipe: ClassVar[str] = "grpo_arithmetic_smollm2"
    algorithm: ClassVar[str] = "grpo"

    grpo: GRPOLoopConfig = GRPOLoopConfig()
    """Group relative policy optimisation: sizes, advantages and validation of the loop."""

    loss_fn: LossConfig = LossConfig()
    """The clipped policy loss and its KL term."""

    policy: PolicyConfig  # pyright: ignore[reportIncompatibleVariableOverride]  # sections are frozen
    """The model, and how it is trained and sampled."""

    data: DataConfig
    """The problems, and how they become prompts."""

    env: Annotated[dict[str, EnvironmentConfig], Field(min_length=1)]
    """The environments by name; a data set names the one that judges its tasks."""

    @property
    def loop(self) -> LoopConfig:
        """The section `grpo`."""
        return self.grpo

    @property
    def num_rollouts_per_step(self) -> int:
        """Answers sampled in one step."""
        return self.grpo.num_prompts_per_step * self.grpo.num_generations_per_prompt

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that still leaves room for a whole answer."""
        room = self.policy.max_total_sequence_length - self.policy.generation.max_new_tokens
        return self.data.max_input_seq_length or room

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        rollouts, batch = self.num_rollouts_per_step, self.policy.train_global_batch_size
        answers = self.grpo.num_generations_per_prompt
        if rollouts % batch or batch % answers:
            raise conflict(
                f"a step has {self.grpo.num_prompts_per_step} prompts x {answers} answers = {rollouts} rollouts, which"
                f" policy.train_global_batch_size = {batch} does not divide into equal parts of whole groups:"
                f" make it a divisor of {rollouts} and a multiple of {answers}",
                "policy.train_global_batch_size",
            )
        if self.grpo.use_leave_one_out_baseline and answers == 1:
            raise conflict(
                "grpo.num_generations_per_prompt = 1 leaves no other answer for grpo.use_leave_one_out_baseline:"
                " raise the first or set the second to false",
                "grpo.num_generations_per_prompt",
                "grpo.use_leave_one_out_baseline",
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
        if self.grpo.validates and self.data.validation is None and not self.data.split_validation_size:
            raise conflict(
                "the run validates but data.validation is not set: set it or data.split_validation_size, or turn off"
                " grpo.val_period, val_at_start and val_at_end",
                "grpo.val_period",
            )
        return self
