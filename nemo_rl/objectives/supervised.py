"""Supervised fine-tuning: the negative log-likelihood of the tokens to imitate."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.metrics import Metrics
from nemo_rl.objectives.logprobs import Reads, TokenOutputs
from nemo_rl.objectives.policy import token_means


def nll_loss(policy_logprobs: Tensor) -> Tensor:
    """Negative log-likelihood -lp of every token [M], in nats."""
    return -policy_logprobs


@dataclass(frozen=True, slots=True)
class SupervisedObjective:
    """SFT's objective; reads no column.

    Metrics: `nll` (its exponential is the perplexity) and `token_probability`, means over tokens, and `entropy`.
    """

    reads: ClassVar[Reads] = "logprobs"

    def __call__(self, outputs: TokenOutputs, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        """Return the loss of every loss token, float32 [M], and the metrics of the micro-batch."""
        loss = nll_loss(outputs.policy_logprobs)
        probability = outputs.policy_logprobs.detach().exp()
        return loss, token_means({"nll": loss, "token_probability": probability, "entropy": outputs.entropy})
