"""The configuration of a GRPO run; the members of the family are settings of it."""

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nemo_rl.config.schema.base import PositiveFloat, PositiveInt, Section, conflict
from nemo_rl.config.schema.loss import LossConfig
from nemo_rl.config.schema.sampled import RolloutLoopConfig, SampledRunConfig


class RewardScalingConfig(Section):
    """A straight line from the range of the environment's rewards to another, with rewards beyond it clamped."""

    source_min: float = 0.0
    """Reward that becomes `target_min`, as does any lower one."""

    source_max: float = 1.0
    """Reward that becomes `target_max`, as does any higher one."""

    target_min: float = 0.0
    """Lowest reward trained on."""

    target_max: float = 1.0
    """Highest reward trained on."""

    @model_validator(mode="after")
    def _source_is_an_interval(self) -> Self:
        if self.source_min >= self.source_max:
            raise conflict(
                f"source_min = {self.source_min:g} is not below source_max = {self.source_max:g}: lower the first",
                "source_min",
                "source_max",
            )
        return self


class RewardShapingConfig(Section):
    """A penalty that grows with the length of an answer once it comes close to the longest allowed (DAPO)."""

    overlong_buffer_length: PositiveInt
    """Tokens before the longest allowed length in which the penalty grows from 0 to its whole."""

    overlong_buffer_penalty: PositiveFloat = 1.0
    """What an answer of the longest allowed length loses."""

    max_response_length: PositiveInt | None = None
    """The longest allowed length in tokens; None is `policy.generation.max_new_tokens`."""


class RewardedLoopConfig(RolloutLoopConfig):
    """What becomes of the rewards before they are learnt from."""

    overlong_filtering: bool = False
    """Leave answers that hit `policy.generation.max_new_tokens` out of the loss."""

    reward_scaling: RewardScalingConfig | None = None
    """Map the rewards from one range to another; None leaves them."""

    reward_shaping: RewardShapingConfig | None = None
    """Penalise overlong answers, after the scaling; None does not."""


class GroupAdvantages(Section):
    """An answer's reward against those of the other answers to its prompt: GRPO, Dr. GRPO, RLOO."""

    name: Literal["grpo"]
    """Within the group."""

    normalize_rewards: bool = True
    """Divide by the standard deviation of the group's rewards."""

    use_leave_one_out_baseline: bool = True
    """Compare each answer with the mean reward of the others instead of the whole group's."""


class ReinforcePlusPlusAdvantages(Section):
    """The rewards to come, normalised over the tokens of the whole batch: REINFORCE++."""

    name: Literal["reinforce_plus_plus"]
    """Over the batch."""

    minus_baseline: bool = False
    """Subtract the mean reward of the group first (REINFORCE++-baseline)."""


class DecoupledAdvantages(Section):
    """Each named reward within its group, added up by weight, then normalised over the batch: GDPO."""

    name: Literal["gdpo"]
    """Each reward by itself."""

    reward_weights: dict[str, float] | None = None
    """Weight of each named reward; None weighs all 1."""


type AdvantageConfig = Annotated[
    GroupAdvantages | ReinforcePlusPlusAdvantages | DecoupledAdvantages, Field(discriminator="name")
]


class DynamicSamplingConfig(Section):
    """Sample until a step has all its groups, each with answers whose rewards differ (DAPO)."""

    max_tries: PositiveInt = 10
    """Rounds of sampling after which a step that is still not full stops the run."""

    batch_multiplier: Annotated[float, Field(ge=1)] = 1.0
    """Prompts of one round, in multiples of `grpo.num_prompts_per_step`."""


class GRPOLoopConfig(RewardedLoopConfig):
    """Group relative policy optimisation: sizes, rewards, advantages and validation of the loop."""

    num_epochs_per_step: PositiveInt = 1
    """Passes over the rollouts of a step, each in as many optimizer steps as `policy.train_global_batch_size` cuts it
    into; the ratio compares with the weights before the first of them."""

    adv_estimator: AdvantageConfig = GroupAdvantages(name="grpo")
    """How rewards become advantages."""

    advantage_clip_low: float | None = None
    """Lowest advantage; None has no bound."""

    advantage_clip_high: float | None = None
    """Highest advantage; None has no bound."""

    skip_uniform_groups: bool = True
    """Do not compute answers whose advantage is zero; has no effect when the loss has a KL term."""

    dynamic_sampling: DynamicSamplingConfig | None = None
    """Replace groups whose rewards are all equal by others; None trains on what comes."""

    @property
    def compares_within_groups(self) -> bool:
        """Whether an advantage depends on the other answers to the prompt."""
        return not isinstance(self.adv_estimator, ReinforcePlusPlusAdvantages) or self.adv_estimator.minus_baseline

    @model_validator(mode="after")
    def _clip_is_an_interval(self) -> Self:
        low, high = self.advantage_clip_low, self.advantage_clip_high
        if low is not None and high is not None and low >= high:
            raise conflict(
                f"advantage_clip_low = {low:g} is not below advantage_clip_high = {high:g}: lower the first",
                "advantage_clip_low",
                "advantage_clip_high",
            )
        return self

    @model_validator(mode="after")
    def _groups_have_others(self) -> Self:
        if self.num_generations_per_prompt > 1:
            return self
        if self.compares_within_groups:
            raise conflict(
                "num_generations_per_prompt = 1 leaves no other answer to compare with, which adv_estimator ="
                f" {self.adv_estimator.name} does: raise the first, or use reinforce_plus_plus without minus_baseline",
                "num_generations_per_prompt",
                "adv_estimator",
            )
        if self.dynamic_sampling is not None:
            raise conflict(
                "num_generations_per_prompt = 1 leaves no group whose rewards differ, which dynamic_sampling looks for:"
                " raise the first or set the second to null",
                "num_generations_per_prompt",
                "dynamic_sampling",
            )
        return self

    @model_validator(mode="after")
    def _rewards_stay_apart(self) -> Self:
        changed = "reward_scaling" if self.reward_scaling else "reward_shaping" if self.reward_shaping else None
        if changed and isinstance(self.adv_estimator, DecoupledAdvantages):
            raise conflict(
                f"{changed} changes the sum of the named rewards, which adv_estimator = gdpo does not use: set it to"
                " null and let the environment return what you want as a reward of its own",
                changed,
                "adv_estimator",
            )
        return self


def check_penalty(section: str, loop: RewardedLoopConfig, max_new_tokens: int) -> None:
    """Refuse a penalty for length that begins before an answer does."""
    shaping = loop.reward_shaping
    longest = (shaping.max_response_length or max_new_tokens) if shaping else 0
    if shaping and shaping.overlong_buffer_length > longest:
        key = f"{section}.reward_shaping.overlong_buffer_length"
        raise conflict(
            f"{key} = {shaping.overlong_buffer_length} is more than the longest answer, {longest} tokens: lower it",
            key,
            "policy.generation.max_new_tokens",
        )


class GRPOConfig(SampledRunConfig):
    """A GRPO run."""

    default_recipe: ClassVar[str] = "grpo_arithmetic_smollm2"
    algorithm: ClassVar[str] = "grpo"

    grpo: GRPOLoopConfig = GRPOLoopConfig()
    """Group relative policy optimisation: sizes, rewards, advantages and validation of the loop."""

    loss_fn: LossConfig = LossConfig()
    """The policy loss, its KL term, and the correction for a sampler that differs from the trainer."""

    @property
    def loop(self) -> RolloutLoopConfig:
        """The section `grpo`."""
        return self.grpo

    @property
    def num_prompts_per_draw(self) -> int:
        """Problems drawn from the data at a time."""
        rule = self.grpo.dynamic_sampling
        return math.ceil(self.grpo.num_prompts_per_step * (rule.batch_multiplier if rule else 1))

    @property
    def num_passes_per_step(self) -> int:
        """How often the rollouts of a step are trained on."""
        return self.grpo.num_epochs_per_step

    @model_validator(mode="after")
    def _penalty_has_room(self) -> Self:
        check_penalty(self.algorithm, self.grpo, self.policy.generation.max_new_tokens)
        return self

    @model_validator(mode="after")
    def _named_rewards_have_no_kl(self) -> Self:
        if self.loss_fn.kl_in_reward and isinstance(self.grpo.adv_estimator, DecoupledAdvantages):
            raise conflict(
                "loss_fn.reference_policy_kl_place = reward changes the sum of the named rewards, which"
                " grpo.adv_estimator = gdpo does not use: set the first to loss",
                "loss_fn.reference_policy_kl_place",
                "grpo.adv_estimator",
            )
        return self
