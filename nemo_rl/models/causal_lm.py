"""`CausalLM`: a Transformers model as a trunk that runs on streams and a head that scores tokens."""

from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nemo_rl.errors import ModelError
from nemo_rl.models.attention import AttentionPlan, use_plans
from nemo_rl.objectives.logprobs import TokenHead


@dataclass(frozen=True, slots=True)
class CausalLM:
    """The policy. Training and a colocated sampler hold the same object, hence the very same weights.

    Attributes:
        module: the whole Transformers model, its attention replaced by attention plans.
        trunk: the model without its LM head.
        head: the LM head, [V, H].
        logit_scale: multiplies raw logits.
        softcap: Gemma's final soft cap, or None.
    """

    module: PreTrainedModel
    trunk: nn.Module
    head: nn.Linear
    logit_scale: float
    softcap: float | None

    @classmethod
    def wrap(cls, module: PreTrainedModel) -> "CausalLM":
        """Take over a loaded `AutoModelForCausalLM`.

        Raises:
            ModelError: if the model has no attention interface or no linear LM head.
        """
        head = module.get_output_embeddings()
        if not isinstance(head, nn.Linear) or module.base_model is module:
            raise ModelError(f"{type(module).__name__} is not a causal language model with a linear LM head")
        use_plans(module)
        settings = module.config.to_dict()
        scale = float(settings.get("logit_scale") or 1.0) / float(settings.get("logits_scaling") or 1.0)
        return cls(module, module.base_model, head, scale, settings.get("final_logit_softcapping"))

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def hidden(self, input_ids: Tensor, position_ids: Tensor, plan: AttentionPlan) -> Tensor:
        """Run the trunk over a stream: int64 [S], int64 [S] -> last hidden states [S, H]."""
        output = self.trunk(
            input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, attention_plan=plan
        )
        return cast(Tensor, output.last_hidden_state)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute whole logits, float32 [S, V], from hidden states [S, H]; for sampling."""
        logits = F.linear(hidden, self.head.weight, self.head.bias).float()
        if self.logit_scale != 1.0:
            logits *= self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def token_head(self, *, temperature: float, chunk_size: int, with_entropy: bool = True) -> TokenHead:
        """Score tokens without whole logits; see `nemo_rl.objectives.logprobs`."""
        return TokenHead(
            temperature=temperature,
            chunk_size=chunk_size,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            with_entropy=with_entropy,
        )
