"""The configuration of preference training: DPO and its kin."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nemo_rl.config.schema.base import NonNegativeInt, PositiveFloat, conflict
from nemo_rl.config.schema.run import ExampleLoopConfig, ExampleRunConfig, check_room_for_pairs

_PAIRS = ("dpo", "ipo", "hinge", "simpo", "orpo")
_READ_BY = {
    "label_smoothing": ("dpo",),
    "simpo_margin": ("simpo",),
    "preference_average_log_probs": _PAIRS,
    "preference_loss_weight": _PAIRS,
    "sft_loss_weight": _PAIRS,
    "sft_average_log_probs": _PAIRS,
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Which losses a setting has an effect on."""


class PreferenceLoopConfig(ExampleLoopConfig):
    """The preference loss, and steps, validation and seed of the loop."""

    preference_loss: Literal["dpo", "ipo", "hinge", "simpo", "orpo", "kto"] = "dpo"
    """Loss of a pair: `dpo` (cDPO with `label_smoothing`), `ipo`, `hinge` (SLiC), `simpo` and `orpo`; `kto` learns from
    single answers that are judged good or bad. `simpo` and `orpo` need no reference."""

    reference_policy_kl_penalty: PositiveFloat = 0.1
    """Beta: how strongly the policy is held to the weights it started from; the scale of the rewards."""

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """For `dpo`: probability that a pair is labelled the wrong way round (cDPO)."""

    simpo_margin: Annotated[float, Field(ge=0)] = 1.0
    """For `simpo`: by how much the chosen answer's reward should exceed the other one's (gamma)."""

    preference_average_log_probs: bool = False
    """Average log-probabilities over an answer instead of adding them up; `simpo` and `orpo` always do."""

    preference_loss_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the preference loss."""

    sft_loss_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen answer's negative log-likelihood; the form of ORPO's paper has 1."""

    sft_average_log_probs: bool = True
    """Average that likelihood over the answer instead of adding it up."""

    desirable_weight: PositiveFloat = 1.0
    """For `kto`: weight of good answers."""

    undesirable_weight: PositiveFloat = 1.0
    """For `kto`: weight of bad answers."""

    reference_cache_mib: NonNegativeInt = 1024
    """Keep the reference's log-probabilities in up to so many MiB of the driver's memory, so that those of a record are
    computed once (4 bytes a token of an answer, 256 an answer); 0 computes them every time."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        for name, losses in _READ_BY.items():
            given = getattr(self, name)
            if self.preference_loss not in losses and given != type(self).model_fields[name].default:
                raise conflict(
                    f"{name} = {given} has no effect on preference_loss = {self.preference_loss}, only on"
                    f" {', '.join(losses)}: leave it out",
                    name,
                    "preference_loss",
                )
        return self

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the weights that the policy started from."""
        return self.preference_loss in ("dpo", "ipo", "hinge", "kto")


class DPOConfig(ExampleRunConfig):
    """A run of preference training."""

    default_recipe: ClassVar[str] = "dpo_arithmetic_smollm2"
    algorithm: ClassVar[str] = "dpo"

    dpo: PreferenceLoopConfig = PreferenceLoopConfig()
    """The preference loss, and steps, validation and seed of the loop."""

    @property
    def loop(self) -> PreferenceLoopConfig:
        """The section `dpo`."""
        return self.dpo

    @property
    def compares_policies(self) -> bool:
        """Whether the loss has a reference."""
        return self.dpo.needs_reference

    @model_validator(mode="after")
    def _pairs_fit(self) -> Self:
        if self.dpo.preference_loss != "kto":
            check_room_for_pairs(self)
        return self

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if not self.dpo.preference_loss_weight and not self.dpo.sft_loss_weight:
            raise conflict(
                "dpo.preference_loss_weight and dpo.sft_loss_weight are both 0, so nothing is learnt: raise one",
                "dpo.preference_loss_weight",
                "dpo.sft_loss_weight",
            )
        return self

    @model_validator(mode="after")
    def _kto_has_others(self) -> Self:
        if self.dpo.preference_loss == "kto" and self.policy.train_global_batch_size < 2:
            raise conflict(
                "dpo.preference_loss = kto compares each prompt with another one's answer: set"
                " policy.train_global_batch_size to at least 2",
                "policy.train_global_batch_size",
            )
        return self
