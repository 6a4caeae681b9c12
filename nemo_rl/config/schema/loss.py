"""Section `loss_fn`: the policy loss of GRPO and its family, and of PPO."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nemo_rl.config.schema.base import PositiveFloat, Section, Share, conflict


class CorrectionBounds(Section):
    """Between which bounds an importance weight is let through."""

    low: Annotated[float, Field(ge=0)]
    """Lower bound."""

    high: PositiveFloat
    """Upper bound."""

    @model_validator(mode="after")
    def _is_an_interval(self) -> Self:
        if self.low >= self.high:
            raise conflict(f"low = {self.low:g} is not below high = {self.high:g}: lower the first", "low", "high")
        return self


class TokenCorrection(CorrectionBounds):
    """Every token's loss times its own importance weight, clamped (truncated importance sampling)."""

    type: Literal["token"]
    """A weight for each token."""

    low: Annotated[float, Field(ge=0)] = 0.0
    """Lower bound of the weight."""

    high: PositiveFloat = 2.0
    """Upper bound of the weight."""


class SequenceCorrection(CorrectionBounds):
    """Every token's loss times the product of its answer's importance weights, clamped: without bias, but noisy."""

    type: Literal["sequence"]
    """A weight for each answer."""

    low: Annotated[float, Field(ge=0)] = 0.0
    """Lower bound of the product."""

    high: PositiveFloat = 2.0
    """Upper bound of the product."""


class IcePopCorrection(CorrectionBounds):
    """Every token's loss times its own importance weight; tokens whose weight is out of bounds are left out."""

    type: Literal["icepop"]
    """A weight for each token, or none."""

    low: Annotated[float, Field(ge=0)] = 0.5
    """Lowest weight of a token that is trained on."""

    high: PositiveFloat = 5.0
    """Highest weight of a token that is trained on."""


class SequenceMaskCorrection(CorrectionBounds):
    """Every token's loss times its own importance weight; answers with a geometric mean out of bounds are left out."""

    type: Literal["sequence_mask"]
    """A weight for each token, or none in the whole answer."""

    low: Annotated[float, Field(ge=0)] = 0.999
    """Lowest geometric mean of an answer that is trained on."""

    high: PositiveFloat = 1.002
    """Highest geometric mean of an answer that is trained on."""


type CorrectionConfig = Annotated[
    TokenCorrection | SequenceCorrection | IcePopCorrection | SequenceMaskCorrection, Field(discriminator="type")
]


class LossConfig(Section):
    """The policy loss, its KL term, and the correction for a sampler that differs from the trainer."""

    policy_loss: Literal["clipped", "cispo", "reinforce"] = "clipped"
    """`clipped` is PPO's; `cispo` clips the ratio as a weight, so that every token keeps its gradient; `reinforce` has
    no ratio."""

    ratio_level: Literal["token", "sequence"] = "token"
    """`sequence` gives every token the geometric mean of its answer's ratios (GSPO)."""

    ratio_clip_min: Share = 0.2
    """The probability ratio gives no gradient below 1 minus this, when the advantage is negative."""

    ratio_clip_max: PositiveFloat = 0.2
    """The probability ratio gives no gradient above 1 plus this, when the advantage is positive; DAPO's clip-higher is
    a larger one than `ratio_clip_min`."""

    ratio_clip_c: Annotated[float, Field(gt=1)] | None = None
    """Dual clipping: bounds the loss of a negative advantage A at -A times this; None leaves it out."""

    reduction: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """Weight of a token: equal over the batch, equal per answer, or by a constant length (Dr. GRPO)."""

    correction: CorrectionConfig | None = None
    """How the loss is weighed for a sampler whose probabilities are not the trainer's; None does not."""

    reference_policy_kl_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL divergence to the starting weights; 0 leaves it out, and the reference model with it."""

    reference_policy_kl_place: Literal["loss", "reward"] = "loss"
    """Whether the divergence is added to the loss or subtracted from the reward."""

    reference_policy_kl_type: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence (Schulman, Approximating KL divergence, 2020)."""

    kl_input_clamp_value: PositiveFloat = 20.0
    """Bound of the log-probability difference that goes into the KL estimator."""

    kl_output_clamp_value: PositiveFloat = 10.0
    """Bound of the KL estimate of one token."""

    use_on_policy_kl_approximation: bool = False
    """Weigh the KL term in the loss by how much likelier a token is now than it was for the sampler."""

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the loss compares with the weights before the step, if these have moved since."""
        return self.policy_loss != "reinforce" or self.correction is not None

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss compares with the starting weights."""
        return self.reference_policy_kl_penalty > 0 and self.reference_policy_kl_place == "loss"

    @property
    def kl_in_reward(self) -> bool:
        """Whether the rewards do."""
        return self.reference_policy_kl_penalty > 0 and self.reference_policy_kl_place == "reward"

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if self.ratio_clip_c is not None and self.policy_loss != "clipped":
            raise conflict(
                f"ratio_clip_c bounds the clipped loss, and policy_loss = {self.policy_loss}: set the first to null",
                "ratio_clip_c",
                "policy_loss",
            )
        if self.policy_loss == "reinforce" and (self.ratio_clip_min, self.ratio_clip_max) != (0.2, 0.2):
            raise conflict(
                "policy_loss = reinforce has no ratio, which ratio_clip_min and ratio_clip_max bound: leave them out",
                "ratio_clip_min",
                "ratio_clip_max",
                "policy_loss",
            )
        if self.ratio_level == "sequence" and self.policy_loss == "reinforce":
            raise conflict(
                "policy_loss = reinforce has no ratio, which ratio_level = sequence asks for: set the second to token",
                "ratio_level",
                "policy_loss",
            )
        if self.use_on_policy_kl_approximation and self.reference_policy_kl_place == "reward":
            raise conflict(
                "use_on_policy_kl_approximation weighs a KL term in the loss, and reference_policy_kl_place = reward:"
                " set the first to false",
                "use_on_policy_kl_approximation",
                "reference_policy_kl_place",
            )
        return self
