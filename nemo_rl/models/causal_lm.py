"""`CausalLM`: a Transformers model as a trunk that runs on streams and a head that scores tokens."""

import logging
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from nemo_rl.data.packing import Stream
from nemo_rl.errors import ModelError
from nemo_rl.models.attention import AttentionPlan, TreeAttention, use_plans
from nemo_rl.models.rows import run_rows
from nemo_rl.objectives.logprobs import TokenHead
from nemo_rl.objectives.truncation import WHOLE, Truncation

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CausalLM:
    """The policy. Training and a colocated sampler hold the same object, hence the very same weights.

    Attributes:
        module: the whole Transformers model.
        takes_plans: its attention is replaced by attention plans; if not, every sequence is a padded row of its own.
        trunk: the model without its LM head.
        head: the LM head, [V, H].
        logit_scale: multiplies raw logits.
        softcap: soft cap of the logits (Gemma), or None.
    """

    module: PreTrainedModel
    takes_plans: bool
    trunk: nn.Module
    head: nn.Linear
    logit_scale: float
    softcap: float | None

    @classmethod
    def wrap(cls, module: PreTrainedModel) -> "CausalLM":
        """Take over a loaded `AutoModelForCausalLM`.

        Raises:
            ModelError: if the logits are not those of a linear LM head on the trunk's last hidden states.
        """
        head = module.get_output_embeddings()
        if not isinstance(head, nn.Linear) or module.base_model is module:
            raise ModelError(f"{type(module).__name__} is not a causal language model with a linear LM head")
        model = cls(module, False, module.base_model, head, *_logit_rule(module.config))
        model._check_head()
        takes_plans = use_plans(module)
        if not takes_plans:
            _log.warning(
                "%s does not mix tokens by plain attention alone, so it trains on padded rows and shares no prefixes",
                type(module).__name__,
            )
        return replace(model, takes_plans=takes_plans)

    def _check_head(self) -> None:
        """Compare the logits of two tokens with the model's own, as some models scale or transform them on the way."""
        tokens = torch.tensor([[0, 1]], device=self.head.weight.device)
        with torch.no_grad():
            expected = self.module(input_ids=tokens, use_cache=False).logits[0].float()
            got = self.logits(self.trunk(input_ids=tokens, use_cache=False).last_hidden_state[0])
        if got.shape != expected.shape or (got - expected).norm() > 1e-2 * expected.norm():
            raise ModelError(
                f"{type(self.module).__name__} makes its logits from hidden states in a way of its own; choose another"
            )

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def stream_hidden(self, stream: Stream) -> Tensor:
        """Run the trunk over a micro-batch: last hidden states [S, H]."""
        device = self.head.weight.device
        input_ids = stream.input_ids.to(device)
        if not self.takes_plans:
            return run_rows(self.trunk, input_ids, stream.tree)
        return self.hidden(input_ids, stream.position_ids.to(device), TreeAttention(stream.tree, device))

    def hidden(self, input_ids: Tensor, position_ids: Tensor, plan: AttentionPlan) -> Tensor:
        """Run the trunk along a plan, which the model must take: int64 [S], int64 [S] -> last hidden states [S, H]."""
        output = self.trunk(
            input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, attention_plan=plan
        )
        return cast(Tensor, output.last_hidden_state)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute whole logits, float32 [S, V], from hidden states [S, H]; for sampling."""
        logits = F.linear(hidden.to(self.head.weight.dtype), self.head.weight, self.head.bias).float()
        if self.logit_scale != 1.0:
            logits *= self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def token_head(
        self, *, temperature: float, chunk_size: int, truncation: Truncation = WHOLE, with_entropy: bool = True
    ) -> TokenHead:
        """Score tokens without whole logits; see `nemo_rl.objectives.logprobs`."""
        return TokenHead(
            temperature=temperature,
            chunk_size=chunk_size,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            truncation=truncation,
            with_entropy=with_entropy,
        )


def _logit_rule(config: PreTrainedConfig) -> tuple[float, float | None]:
    """Read the factor and the soft cap of the raw logits under the names that families give them."""
    settings = config.to_dict()
    scale = float(settings.get("logit_scale") or 1.0) / float(settings.get("logits_scaling") or 1.0)
    cap = settings.get("final_logit_softcapping") or settings.get("logits_soft_cap")
    return scale * float(settings.get("lm_head_multiplier") or 1.0), cap
