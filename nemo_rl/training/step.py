"""One optimizer step: the only place that cuts a batch, runs the model, calls backward, clips and steps.

A loss is already a sum of `loss_weights * token_loss` over the whole batch, so nothing here divides, and how the batch
is cut into micro-batches changes nothing but the memory it takes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from nemo_rl.config.schema.policy import PackingAlgorithm
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.cost import useful_tokens
from nemo_rl.data.micro_batches import cut, padding_micro_batch
from nemo_rl.data.packing import Stream, build_stream
from nemo_rl.errors import BackendError, DataError
from nemo_rl.interfaces import Objective
from nemo_rl.metrics import Max, Mean, Metrics, Sum, merge
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.models.scalar_model import ScalarModel, scalar_values
from nemo_rl.objectives.distillation import DistributionOutputs
from nemo_rl.objectives.logprobs import LogitHead, Reads, TokenOutputs, select_hidden
from nemo_rl.objectives.truncation import WHOLE, Truncation
from nemo_rl.objectives.value import ScalarOutputs
from nemo_rl.training.pytorch.routing import (
    Balance,
    BalancePenalty,
    balance_loss,
    expert_counts,
    record_routing,
    routing_metrics,
    update_biases,
)

type Outputs = TokenOutputs | DistributionOutputs | ScalarOutputs


@dataclass(frozen=True, slots=True)
class Scorer:
    """How a batch becomes what an objective reads.

    Attributes:
        model: the policy, a reward model or a critic.
        temperature: of the sampler; the logits are divided by it.
        chunk_size: tokens whose logits exist at a time.
        share_prefixes: compute a shared prefix once, if the model takes attention plans.
        min_shared: shortest prefix worth sharing, in tokens.
        packing: fills the micro-batches.
        agree: from the number of micro-batches of this rank to the number that every rank runs, a collective call; None
            where no other rank waits.
        autocast: dtype to compute in when the weights are float32, or None.
        truncation: of the sampler.
        teachers: heads that the model is compared with.
    """

    model: CausalLM | ScalarModel
    temperature: float = 1.0
    chunk_size: int = 256
    share_prefixes: bool = True
    min_shared: int = 8
    packing: PackingAlgorithm = "first_fit_decreasing"
    agree: Callable[[int], int] | None = None
    autocast: torch.dtype | None = None
    truncation: Truncation = WHOLE
    teachers: tuple[LogitHead, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def _shares(self) -> bool:
        return self.share_prefixes and self.model.takes_plans

    def cut(self, batch: TokenBatch, max_tokens: int) -> Iterator[tuple[TokenBatch, bool]]:
        """Cut a batch into what the model runs, one micro-batch in memory at a time.

        Ranks whose collective calls meet in every pass (FSDP) must run equally many; those that have fewer run padding
        afterwards, a small micro-batch with `loss_weights` of 0.

        Yields:
            Micro-batches of at most `max_tokens` computed tokens, and whether they count: padding does not. Sequences
            without loss are in none.
        """
        share, min_shared = self._shares, self.min_shared
        parts = cut(batch, max_tokens=max_tokens, algorithm=self.packing, share_prefixes=share, min_shared=min_shared)
        missing = 0 if self.agree is None else self.agree(len(parts)) - len(parts)
        for indices in parts:
            yield batch.select(indices), True
        if missing:
            padding = padding_micro_batch(batch, max_tokens=max_tokens, share_prefixes=share, min_shared=min_shared)
            yield from [(padding, False)] * missing

    def score(
        self, batch: TokenBatch, reads: Reads = "logprobs", *, with_entropy: bool = True
    ) -> tuple[Outputs, Stream]:
        """Run the model over one micro-batch: outputs for its M loss tokens, and the stream that produced them.

        Raises:
            BackendError: the model has no head for what is read.
        """
        stream = build_stream(batch, share_prefixes=self._shares, min_shared=self.min_shared)
        trunk_learns = torch.is_grad_enabled() and reads != "head_values"
        with self._arithmetic():
            with torch.set_grad_enabled(trunk_learns):
                hidden = self.model.stream_hidden(stream)
            match reads, self.model:
                case "logprobs", CausalLM() as model:
                    return self._token_outputs(model, hidden, stream, with_entropy), stream
                case "distribution", CausalLM() as model:
                    rows = self._rows(hidden, stream)
                    return DistributionOutputs(rows, self._logits(model), self.teachers), stream
                case "values" | "head_values", ScalarModel(score=head) | CausalLM(value_head=nn.Linear() as head):
                    return ScalarOutputs(scalar_values(head, self._rows(hidden, stream))), stream
                case _:
                    raise BackendError(
                        f"the objective reads {reads}, for which {type(self.model.module).__name__} has no head; train "
                        "a model of the right kind"
                    )

    def _token_outputs(self, model: CausalLM, hidden: Tensor, stream: Stream, with_entropy: bool) -> TokenOutputs:
        head = model.token_head(
            temperature=self.temperature,
            chunk_size=self.chunk_size,
            truncation=self.truncation,
            with_entropy=with_entropy,
        )
        # equal answers ask for the same predictions: each goes through the head once
        pairs, place = torch.stack([stream.predictor, stream.target]).unique(dim=1, return_inverse=True)
        predictor, target = pairs.to(self.device)
        logprobs, entropy = head(hidden, _full(model.head.weight), predictor, target, bias=model.head.bias)
        place = place.to(self.device)
        critic = model.value_head if with_entropy else None
        values = None if critic is None else scalar_values(critic, self._rows(hidden, stream))
        return TokenOutputs(logprobs[place], entropy[place], values)

    def _rows(self, hidden: Tensor, stream: Stream) -> Tensor:
        return select_hidden(hidden, stream.predictor.to(self.device))

    def _logits(self, model: CausalLM) -> Callable[[Tensor], Tensor]:
        """The LM head as an objective calls it, outside of `score`."""

        def logits(rows: Tensor) -> Tensor:
            with self._arithmetic():
                return model.logits(rows)

        return logits

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)


def train_step(
    scorer: Scorer,
    batch: TokenBatch,
    objective: Objective,
    *,
    max_tokens: int,
    update: Callable[[], Metrics],
    balance: Balance | None = None,
) -> Metrics:
    """Add up the gradients of all micro-batches, then call `update` (clip, step, schedule) once.

    Args:
        scorer: the model and how to run it.
        batch: with `loss_mask`, `loss_weights` and the columns that the objective reads.
        objective: gives every loss token's loss.
        max_tokens: budget of a micro-batch in computed tokens.
        update: applies the accumulated gradients and returns its own metrics.
        balance: how the experts of a mixture are kept equally busy, or None.

    Returns:
        The objective's metrics, `update`'s, `loss`, the tokens given, with loss and computed, and how well they were
        packed: `packing_fill`, computed tokens per token of budget, and `tokens_computed_per_token`, computed tokens
        per token that must enter the model. Of a mixture of experts also those of `routing_metrics`, and
        `balance_loss` before its coefficient.

    Raises:
        DataError: no token of the batch, or of any rank's that `scorer.agree` speaks for, carries loss.
        BackendError: the loss is not finite, or the model has no experts to balance; no weight has changed then.
    """
    penalty = None if balance is None else _penalty(scorer, batch, objective, max_tokens, balance)
    parts: list[Metrics] = []
    num_run = 0
    for micro_batch, counts in scorer.cut(batch, max_tokens):
        loss, metrics = _loss(scorer, micro_batch, objective, penalty if counts else None)
        if not math.isfinite(metrics["loss"].value):
            raise BackendError(
                f"the loss is {metrics['loss'].value}; lower the learning rate or look at the rollouts of this step"
            )
        loss.backward()
        num_run += 1
        if counts:
            parts.append(metrics)
    if not num_run:
        raise DataError("no token of the batch carries loss; drop such a batch before training on it")
    updated = update()
    if balance is not None and penalty is not None and balance.bias_rate:
        update_biases(scorer.model.module, penalty.counts, balance.bias_rate)
    return merge([*parts, updated, _packed(parts, batch, max_tokens, scorer.min_shared)])


def evaluate_step(scorer: Scorer, batch: TokenBatch, objective: Objective, *, max_tokens: int) -> Metrics:
    """The objective's metrics and the loss of a batch, cut as in training; no gradient."""
    with torch.no_grad():
        run = [
            (_loss(scorer, micro_batch, objective)[1], counts) for micro_batch, counts in scorer.cut(batch, max_tokens)
        ]
    return merge(metrics for metrics, counts in run if counts)


def _penalty(
    scorer: Scorer, batch: TokenBatch, objective: Objective, max_tokens: int, balance: Balance
) -> BalancePenalty:
    """Count how often the predictions of the global batch choose each expert, before any of them is trained on."""
    parts: list[Tensor] = []
    for micro_batch, counts in scorer.cut(batch, max_tokens):
        score = partial(scorer.score, micro_batch, objective.reads, with_entropy=False)
        with torch.no_grad(), record_routing(scorer.model.module) as routings:
            _, stream = scorer.model.runner.run(score)
        if not (routings and scorer.model.takes_plans):
            raise BackendError(
                f"{type(scorer.model.module).__name__} has no routers to be balanced on packed tokens; turn the balance"
                " of experts off"
            )
        parts.append(expert_counts(routings, stream.predictor if counts else stream.predictor[:0]))
    if not parts:
        raise DataError("no token of the batch carries loss; drop such a batch before training on it")
    return balance.penalty(torch.stack(parts).sum(0))


def _loss(
    scorer: Scorer, micro_batch: TokenBatch, objective: Objective, penalty: BalancePenalty | None = None
) -> tuple[Tensor, Metrics]:
    """The loss of a micro-batch, a part of that of the batch, and its metrics."""
    return scorer.model.runner.run(lambda: _score_loss(scorer, micro_batch, objective, penalty))


def _score_loss(
    scorer: Scorer, micro_batch: TokenBatch, objective: Objective, penalty: BalancePenalty | None
) -> tuple[Tensor, Metrics]:
    with record_routing(scorer.model.module) as routings:
        outputs, stream = scorer.score(micro_batch, objective.reads)
    tokens = micro_batch.at(stream.token_index).to(scorer.device)
    token_loss, metrics = objective(outputs, tokens)
    loss = (tokens.token_columns["loss_weights"] * token_loss).sum()
    counted: Metrics = {
        "loss": Sum(loss.item()),
        "tokens_computed": Sum(len(stream.input_ids)),
        "loss_tokens": Sum(len(stream.target)),
        "micro_batches": Sum(1),
    }
    if scorer.model.takes_plans:  # routers see padding otherwise
        counted |= routing_metrics(routings)
    if penalty is not None:
        uneven = balance_loss(routings, stream.predictor, penalty.counts)
        counted["balance_loss"] = Sum(uneven.item())
        loss = loss + penalty.coefficient * uneven
    return loss, metrics | counted


def _packed(parts: list[Metrics], batch: TokenBatch, max_tokens: int, min_shared: int) -> Metrics:
    """How the batch was packed into micro-batches, whose metrics are `parts`."""
    sizes = [part["tokens_computed"].value for part in parts]
    return {
        "tokens": Sum(batch.num_tokens),
        "largest_micro_batch": Max(max(sizes, default=0)),
        "packing_fill": Mean(sum(sizes), len(sizes) * max_tokens),
        "tokens_computed_per_token": Mean(sum(sizes), useful_tokens(batch, min_shared=min_shared)),
    }


def score_tokens(
    scorer: Scorer, batch: TokenBatch, *, max_tokens: int, reads: Literal["logprobs", "values"] = "logprobs"
) -> Tensor:
    """Log-probabilities or values, float32 [N], of the tokens that carry loss, 0 elsewhere; no gradient."""
    scores = torch.zeros(batch.num_tokens)
    for outputs, where in read_tokens(scorer, batch, reads, max_tokens=max_tokens):
        assert not isinstance(outputs, DistributionOutputs)  # not what was asked for
        found = outputs.values if isinstance(outputs, ScalarOutputs) else outputs.policy_logprobs
        scores[where] = found.cpu()
    return scores


def read_tokens(
    scorer: Scorer, batch: TokenBatch, reads: Reads, *, max_tokens: int
) -> Iterator[tuple[Outputs, Tensor]]:
    """Run the model over a batch without gradient.

    Yields:
        Of each micro-batch the outputs for its M loss tokens, and int64 [M] where these stand in the batch.
    """
    numbered = batch.with_columns(position=torch.arange(batch.num_tokens))
    for micro_batch, counts in scorer.cut(numbered, max_tokens):
        with torch.no_grad():  # not around the yield, where it would hold for the caller too
            outputs, stream = scorer.model.runner.run(partial(scorer.score, micro_batch, reads, with_entropy=False))
        if counts:
            yield outputs, micro_batch.token_columns["position"][stream.token_index]


def _full(w):
    return w.full_tensor() if hasattr(w, "full_tensor") else w
