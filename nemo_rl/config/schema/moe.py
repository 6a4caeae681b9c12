"""Section `policy.moe`: how a mixture of experts is trained; a dense model ignores it."""

from typing import Annotated

from pydantic import Field

from nemo_rl.config.schema.base import Section


class MoEConfig(Section):
    """How a mixture of experts is trained; a dense model ignores it."""

    float32_routers: bool = True
    """Compute the logits that choose experts in float32, whatever the precision of the model."""

    balance_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Of the load-balancing loss that is added to the objective; above 0, every step runs a forward pass more."""

    bias_update_rate: Annotated[float, Field(ge=0)] = 0.0
    """How far the biases that choose experts move towards equal loads after every step, in models that have them
    (DeepSeek-V3); above 0, every step runs a forward pass more."""
