"""`CausalLM`: a Transformers model as a trunk that runs on streams and a head that scores tokens."""

import copy
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from nemo_rl.errors import ModelError
from nemo_rl.models.local import local_part
from nemo_rl.models.stream_model import StreamModel, take_plans
from nemo_rl.objectives.logprobs import LogitHead, TokenHead
from nemo_rl.objectives.truncation import WHOLE, Truncation
from nemo_rl.objectives.vocabulary import UNDIVIDED, Vocabulary

VALUE_HEAD = "value_head"
"""Name of the module of a value head, which is no part of the Hugging Face model."""


@dataclass(frozen=True, slots=True)
class CausalLM(StreamModel):
    """The policy. Training and a colocated sampler hold the same object, hence the very same weights.

    Attributes:
        head: the LM head, [V, H]; of a shared vocabulary this rank's rows.
        logit_scale: multiplies raw logits.
        softcap: soft cap of the logits (Gemma), or None.
        value_head: a critic on the same trunk, [1, H], or None.
        vocabulary: which tokens the head's rows are.
    """

    head: nn.Linear
    logit_scale: float
    softcap: float | None
    value_head: nn.Linear | None = None
    vocabulary: Vocabulary = UNDIVIDED

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
        return replace(model, takes_plans=take_plans(module))

    def with_value_head(self) -> "CausalLM":
        """Put a critic on the trunk: a linear head in float32 that starts at zero, trained and saved with the model."""
        value_head = nn.Linear(self.head.in_features, 1, bias=False, device=self.device, dtype=torch.float32)
        nn.init.zeros_(value_head.weight)
        self.module.add_module(VALUE_HEAD, value_head)
        return replace(self, value_head=value_head)

    def _check_head(self) -> None:
        """Compare logits of given hidden states with the model's own, as some scale or transform them on the way.

        What the trunk computes does not matter for that, nor does how many rows the head has, so a stand-in of the
        model has a trunk that gives the hidden states and a small head; it needs no weight of the model.
        """
        names = {child: name for name, child in self.module.named_children()}
        if self.head not in names or self.trunk not in names:
            raise self._refused()
        hidden = torch.linspace(-1, 1, 2 * self.head.in_features).reshape(1, 2, -1).sin()
        small = nn.Linear(self.head.in_features, 3, bias=False)
        small.weight = nn.Parameter(torch.linspace(-2, 2, 3 * self.head.in_features).reshape(3, -1).cos())
        trunk, stand_in = copy.copy(self.trunk), copy.copy(self.module)
        trunk.forward = lambda *_, **__: _GivenStates(hidden)
        stand_in.__dict__["_modules"] = {**dict(self.module.named_children()), names[self.trunk]: trunk}
        stand_in.add_module(names[self.head], small)
        with torch.no_grad():
            expected = stand_in(input_ids=torch.tensor([[0, 1]]), use_cache=False).logits[0].float()
            got = replace(self, head=small).logits(hidden[0])
        if got.shape != expected.shape or (got - expected).norm() > 1e-2 * expected.norm():
            raise self._refused()

    def _refused(self) -> ModelError:
        return ModelError(
            f"{type(self.module).__name__} makes its logits from hidden states in a way of its own; choose another"
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute whole logits, float32 [S, V], from hidden states [S, H]; for sampling."""
        return self.logit_head()(hidden)

    def logit_head(self) -> LogitHead:
        """The head, which shares its weights."""
        weight, bias = self.head_rows()
        return LogitHead(weight, bias, self.logit_scale, self.softcap, self.vocabulary)

    def head_rows(self) -> tuple[Tensor, Tensor | None]:
        """This rank's rows of the head's weight and of its bias."""
        bias = cast("Tensor | None", self.head.bias)
        return local_part(self.head.weight), None if bias is None else local_part(bias)

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
            vocabulary=self.vocabulary,
        )


class _GivenStates:
    """The output of a trunk that computes nothing: hidden states, and None for whatever else some trunk has."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


def _logit_rule(config: PreTrainedConfig) -> tuple[float, float | None]:
    """Read the factor and the soft cap of the raw logits under the names that families give them."""
    settings = config.to_dict()
    scale = float(settings.get("logit_scale") or 1.0) / float(settings.get("logits_scaling") or 1.0)
    cap = settings.get("final_logit_softcapping") or settings.get("logits_soft_cap")
    return scale * float(settings.get("lm_head_multiplier") or 1.0), cap
