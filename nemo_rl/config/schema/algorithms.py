"""The configuration of a GRPO run."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nemo_rl.config.schema.base import PositiveFloat, Section, Share, conflict
from nemo_rl.config.schema.sampled import RolloutLoopConfig, SampledRunConfig


class GRPOLoopConfig(RolloutLoopConfig):
    """Group relative policy optimisation: sizes, advantages and validation of the loop."""

    normalize_rewards: bool = True
    """Divide the advantages by the standard deviation of the group's rewards."""

    use_leave_one_out_baseline: bool = True
    """Compare each answer with the mean reward of the others instead of the whole group's."""

    overlong_filtering: bool = False
    """Leave answers that hit `policy.generation.max_new_tokens` out of the loss."""

    skip_uniform_groups: bool = True
    """Do not compute groups in which every advantage is zero; has no effect when the loss has a KL term."""


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


class GRPOConfig(SampledRunConfig):
    """A GRPO run."""

    default_recipe: ClassVar[str] = "grpo_arithmetic_smollm2"
    algorithm: ClassVar[str] = "grpo"

    grpo: GRPOLoopConfig = GRPOLoopConfig()
    """Group relative policy optimisation: sizes, advantages and validation of the loop."""

    loss_fn: LossConfig = LossConfig()
    """The clipped policy loss and its KL term."""

    @property
    def loop(self) -> RolloutLoopConfig:
        """The section `grpo`."""
        return self.grpo

    @model_validator(mode="after")
    def _group_has_others(self) -> Self:
        if self.grpo.use_leave_one_out_baseline and self.grpo.num_generations_per_prompt == 1:
            raise conflict(
                "grpo.num_generations_per_prompt = 1 leaves no other answer for grpo.use_leave_one_out_baseline:"
                " raise the first or set the second to false",
                "grpo.num_generations_per_prompt",
                "grpo.use_leave_one_out_baseline",
            )
        return self
