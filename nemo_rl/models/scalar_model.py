"""`ScalarModel`: a trunk with one number per token, as reward models and critics have it."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nemo_rl.errors import ModelError
from nemo_rl.models.stream_model import StreamModel, take_plans


@dataclass(frozen=True, slots=True)
class ScalarModel(StreamModel):
    """A reward model or a critic.

    Attributes:
        score: the head, [1, H].
    """

    score: nn.Linear

    @classmethod
    def wrap(cls, module: PreTrainedModel) -> "ScalarModel":
        """Take over a loaded `AutoModelForSequenceClassification` with one label.

        Raises:
            ModelError: its score is not that of a linear head on the trunk's last hidden states.
        """
        heads = [head for name, head in module.named_children() if name == "score"]
        if len(heads) != 1 or not isinstance(heads[0], nn.Linear) or heads[0].out_features != 1:
            raise ModelError(f"{type(module).__name__} has no linear head `score` with one label; choose another model")
        return cls(module, take_plans(module), module.base_model, heads[0])


def scalar_values(head: nn.Linear, hidden: Tensor) -> Tensor:
    """One number per hidden state, in float32 because they are compared to each other: [M, H] -> [M]."""
    bias = None if head.bias is None else head.bias.float()  # pyright: ignore[reportUnnecessaryComparison]
    return F.linear(hidden.float(), head.weight.float(), bias).squeeze(-1)
