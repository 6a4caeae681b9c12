"""One optimizer step: the only place that cuts a batch, runs the model, calls backward, clips and steps.

A loss is already a sum of `loss_weights * token_loss` over the whole batch, so nothing here divides, and how the batch
is cut into micro-batches changes nothing but the memory it takes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.packing import Stream, build_stream, micro_batches
from nemo_rl.errors import BackendError, DataError
from nemo_rl.interfaces import Objective
from nemo_rl.metrics import Max, Metrics, Sum, merge
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.objectives.logprobs import TokenOutputs
from nemo_rl.objectives.truncation import WHOLE, Truncation


@dataclass(frozen=True, slots=True)
class Scorer:
    """How a batch becomes log-probabilities.

    Attributes:
        model: the policy.
        temperature: of the sampler; the logits are divided by it.
        chunk_size: tokens whose logits exist at a time.
        share_prefixes: compute a shared prefix once, if the model takes attention plans.
        min_shared: shortest prefix worth sharing, in tokens.
        autocast: dtype to compute in when the weights are float32, or None.
        truncation: of the sampler.
    """

    model: CausalLM
    temperature: float = 1.0
    chunk_size: int = 256
    share_prefixes: bool = True
    min_shared: int = 8
    autocast: torch.dtype | None = None
    truncation: Truncation = WHOLE

    @property
    def device(self) -> torch.device:
        return self.model.head.weight.device

    @property
    def _shares(self) -> bool:
        return self.share_prefixes and self.model.takes_plans

    def cut(self, batch: TokenBatch, max_tokens: int) -> Iterator[TokenBatch]:
        """Micro-batches of at most `max_tokens` computed tokens; sequences without loss are in none."""
        return micro_batches(batch, max_tokens=max_tokens, share_prefixes=self._shares, min_shared=self.min_shared)

    def score(self, batch: TokenBatch, *, with_entropy: bool = True) -> tuple[TokenOutputs, Stream]:
        """Run the model over one micro-batch: outputs for its M loss tokens, and the stream that produced them."""
        stream = build_stream(batch, share_prefixes=self._shares, min_shared=self.min_shared)
        device = self.device
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            hidden = self.model.stream_hidden(stream)
            head = self.model.token_head(
                temperature=self.temperature,
                chunk_size=self.chunk_size,
                truncation=self.truncation,
                with_entropy=with_entropy,
            )
            # equal answers ask for the same predictions: each goes through the head once
            pairs, place = torch.stack([stream.predictor, stream.target]).unique(dim=1, return_inverse=True)
            predictor, target = pairs.to(device)
            logprobs, entropy = head(hidden, self.model.head.weight, predictor, target, bias=self.model.head.bias)
            place = place.to(device)
        return TokenOutputs(policy_logprobs=logprobs[place], entropy=entropy[place]), stream


def train_step(
    scorer: Scorer, batch: TokenBatch, objective: Objective, *, max_tokens: int, update: Callable[[], Metrics]
) -> Metrics:
    """Add up the gradients of all micro-batches, then call `update` (clip, step, schedule) once.

    Args:
        scorer: the model and how to run it.
        batch: with `loss_mask`, `loss_weights` and the columns that the objective reads.
        objective: gives every loss token's loss.
        max_tokens: budget of a micro-batch in computed tokens.
        update: applies the accumulated gradients and returns its own metrics.

    Returns:
        The objective's metrics, `update`'s, `loss`, and the tokens given, with loss and computed.

    Raises:
        DataError: no token of the batch carries loss.
        BackendError: the loss is not finite; no weight has changed then.
    """
    parts: list[Metrics] = []
    for micro_batch in scorer.cut(batch, max_tokens):
        loss, metrics = _loss(scorer, micro_batch, objective)
        if not math.isfinite(metrics["loss"].value):
            raise BackendError(
                f"the loss is {metrics['loss'].value}; lower the learning rate or look at the rollouts of this step"
            )
        loss.backward()
        parts.append(metrics)
    if not parts:
        raise DataError("no token of the batch carries loss; drop such a batch before training on it")
    return merge([*parts, update(), {"tokens": Sum(batch.num_tokens), "largest_micro_batch": _largest(parts)}])


def evaluate_step(scorer: Scorer, batch: TokenBatch, objective: Objective, *, max_tokens: int) -> Metrics:
    """The objective's metrics and the loss of a batch, cut as in training; no gradient."""
    with torch.no_grad():
        return merge(_loss(scorer, micro_batch, objective)[1] for micro_batch in scorer.cut(batch, max_tokens))


def _loss(scorer: Scorer, micro_batch: TokenBatch, objective: Objective) -> tuple[Tensor, Metrics]:
    """The loss of a micro-batch, a part of that of the batch, and its metrics."""
    outputs, stream = scorer.score(micro_batch)
    tokens = micro_batch.at(stream.token_index).to(scorer.device)
    token_loss, metrics = objective(outputs, tokens)
    loss = (tokens.token_columns["loss_weights"] * token_loss).sum()
    counted: Metrics = {
        "loss": Sum(loss.item()),
        "tokens_computed": Sum(len(stream.input_ids)),
        "loss_tokens": Sum(len(stream.target)),
        "micro_batches": Sum(1),
    }
    return loss, metrics | counted


def _largest(parts: list[Metrics]) -> Max:
    return Max(max(part["tokens_computed"].value for part in parts))


def score_tokens(scorer: Scorer, batch: TokenBatch, *, max_tokens: int) -> Tensor:
    """Log-probabilities float32 [N] of the tokens that carry loss, 0 elsewhere; no gradient."""
    logprobs = torch.zeros(batch.num_tokens)
    numbered = batch.with_columns(position=torch.arange(batch.num_tokens))
    with torch.no_grad():
        for micro_batch in scorer.cut(numbered, max_tokens):
            outputs, stream = scorer.score(micro_batch, with_entropy=False)
            logprobs[micro_batch.token_columns["position"][stream.token_index]] = outputs.policy_logprobs.cpu()
    return logprobs
