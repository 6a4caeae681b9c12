"""The configuration of a PPO run."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nemo_rl.config.schema.algorithms import RewardedLoopConfig, check_penalty
from nemo_rl.config.schema.base import NonNegativeInt, PositiveFloat, PositiveInt, Section, Share, conflict
from nemo_rl.config.schema.loss import LossConfig
from nemo_rl.config.schema.policy import TrainedPolicyConfig
from nemo_rl.config.schema.sampled import RolloutLoopConfig, SampledRunConfig


class GAEConfig(Section):
    """Generalised advantage estimation over the sampled tokens of an answer."""

    name: Literal["gae"] = "gae"
    """The estimator."""

    gae_gamma: Share = 1.0
    """Discount per sampled token."""

    gae_lambda: Share = 0.95
    """0 trusts the critic's next value, 1 the rewards to come."""

    normalize_advantages: bool = True
    """Whiten the advantages over the sampled tokens of the whole step."""


class PPOLoopConfig(RewardedLoopConfig):
    """Proximal policy optimisation: sizes, advantages, passes and validation of the loop."""

    ppo_epochs: PositiveInt = 1
    """Passes of the policy over the rollouts of a step; each pass takes one optimizer step per
    `policy.train_global_batch_size` rollouts."""

    critic_ppo_epochs: PositiveInt | None = None
    """Passes of a separate critic; None is `ppo_epochs`."""

    policy_training_start_step: NonNegativeInt = 0
    """Steps at the beginning in which the critic alone learns."""

    overlong_filtering: bool = False
    """Leave answers that hit `policy.generation.max_new_tokens` out of both losses; otherwise they end there like any
    other, with the reward they were judged to deserve and no value for what might have followed."""

    adv_estimator: GAEConfig = GAEConfig()
    """Generalised advantage estimation over the sampled tokens of an answer."""


class ValueLossConfig(Section):
    """The critic's loss, half the squared error of a value, clipped as the policy's ratio is."""

    scale: PositiveFloat = 1.0
    """Factor of the loss; on a shared trunk, its weight beside the policy loss."""

    cliprange: PositiveFloat | None = 0.2
    """How far from the value before the step's first update a value may move and still learn; None has no bound."""


class SharedValueConfig(Section):
    """A linear head on the policy's trunk; one pass trains both."""

    kind: Literal["shared"]
    """A head on the policy."""


class SeparateValueConfig(TrainedPolicyConfig):
    """A model of its own, in a worker of its own; every setting that is left out is that of section `policy`."""

    kind: Literal["separate"]
    """A model of its own."""

    model_name: str
    """A language model or a reward model with the policy's vocabulary: `embedded:NAME`, a local folder or a name on the
    Hugging Face hub. A head that is not there starts at zero."""

    train_global_batch_size: PositiveInt
    """Rollouts of one optimizer step of the critic, in whole groups."""


type ValueConfig = Annotated[SharedValueConfig | SeparateValueConfig, Field(discriminator="kind")]


class PPOConfig(SampledRunConfig):
    """A PPO run."""

    default_recipe: ClassVar[str] = "ppo_arithmetic_smollm2"
    algorithm: ClassVar[str] = "ppo"

    ppo: PPOLoopConfig = PPOLoopConfig()
    """Proximal policy optimisation: sizes, advantages, passes and validation of the loop."""

    loss_fn: LossConfig = LossConfig()
    """The policy loss, its KL term, and the correction for a sampler that differs from the trainer."""

    value_loss_fn: ValueLossConfig = ValueLossConfig()
    """The critic's loss, half the squared error of a value, clipped as the policy's ratio is."""

    value: ValueConfig = SharedValueConfig(kind="shared")
    """The critic, which says how much reward is still to come."""

    @property
    def loop(self) -> RolloutLoopConfig:
        """The section `ppo`."""
        return self.ppo

    @property
    def num_passes_per_step(self) -> int:
        """Passes of the policy over the rollouts of a step."""
        return self.ppo.ppo_epochs

    @property
    def num_critic_passes_per_step(self) -> int:
        """Passes of a critic of its own."""
        return self.ppo.ppo_epochs if self.ppo.critic_ppo_epochs is None else self.ppo.critic_ppo_epochs

    @property
    def num_models(self) -> int:
        """The policy, and a critic of its own."""
        return 1 if self.critic is None else 2

    @property
    def critic(self) -> SeparateValueConfig | None:
        """The section `value`, if the critic is a model of its own."""
        return self.value if isinstance(self.value, SeparateValueConfig) else None

    @property
    def on_policy(self) -> bool:
        """Whether a batch trains the policy in one optimizer step, before which nothing has moved: rho is 1."""
        return self.ppo.ppo_epochs == 1 and self.num_rollouts_per_step == self.policy.train_global_batch_size

    @model_validator(mode="before")
    @classmethod
    def _critic_is_like_the_policy(cls, values: Any) -> Any:
        """Fill what the section of a separate critic leaves out with what is written for the policy."""
        match values:
            case {"value": {"kind": "separate"} as value, "policy": dict(policy)}:
                like = {name: policy[name] for name in SeparateValueConfig.model_fields if name in policy}
                return {**values, "value": {**like, **value}}
            case _:
                return values

    @model_validator(mode="after")
    def _penalty_has_room(self) -> Self:
        check_penalty(self.algorithm, self.ppo, self.policy.generation.max_new_tokens)
        return self

    @model_validator(mode="after")
    def _critic_fits(self) -> Self:
        critic, answers = self.critic, self.ppo.num_generations_per_prompt
        if critic is None:
            if self.ppo.critic_ppo_epochs not in (None, self.ppo.ppo_epochs):
                raise conflict(
                    f"ppo.critic_ppo_epochs = {self.ppo.critic_ppo_epochs} is for a critic of its own, and value.kind ="
                    " shared trains policy and critic in the same passes: set it to null, or value.kind to separate",
                    "ppo.critic_ppo_epochs",
                    "value.kind",
                )
            return self
        rollouts, batch = self.num_rollouts_per_step, critic.train_global_batch_size
        if rollouts % batch or batch % answers:
            raise conflict(
                f"value.train_global_batch_size = {batch} does not divide the {rollouts} rollouts of a step into equal"
                f" parts of whole groups: make it a divisor of {rollouts} and a multiple of {answers}",
                "value.train_global_batch_size",
            )
        if critic.max_total_sequence_length < self.policy.max_total_sequence_length:
            raise conflict(
                f"value.max_total_sequence_length = {critic.max_total_sequence_length} is less than that of the policy,"
                f" {self.policy.max_total_sequence_length}: raise it or leave it out",
                "value.max_total_sequence_length",
                "policy.max_total_sequence_length",
            )
        return self

    @model_validator(mode="after")
    def _policy_learns(self) -> Self:
        if self.ppo.policy_training_start_step >= self.ppo.max_num_steps:
            raise conflict(
                f"ppo.policy_training_start_step = {self.ppo.policy_training_start_step} leaves the policy none of the"
                f" ppo.max_num_steps = {self.ppo.max_num_steps} steps: lower the first or raise the second",
                "ppo.policy_training_start_step",
                "ppo.max_num_steps",
            )
        return self
