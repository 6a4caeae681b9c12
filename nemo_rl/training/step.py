"""One optimizer step: a batch is cut, its micro-batches are passed through the model, then the weights are stepped.

A loss is already a sum of `loss_weights * token_loss` over the whole batch, so nothing here divides, and how the batch
is cut into micro-batches changes nothing but the memory it takes.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nemo_rl.config.schema.policy import PackingAlgorithm
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.cost import useful_tokens
from nemo_rl.data.micro_batches import cut, padding_micro_batch
from nemo_rl.data.packing import Stream, build_stream
from nemo_rl.data.transfer import moved
from nemo_rl.errors import BackendError, DataError
from nemo_rl.interfaces import Objective
from nemo_rl.metrics import Max, Mean, Metrics, Sum, merge
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.models.hidden import Hidden
from nemo_rl.models.scalar_model import ScalarModel, scalar_values
from nemo_rl.objectives.distillation import DistributionOutputs
from nemo_rl.objectives.logprobs import LogitHead, Reads, TokenHead, TokenOutputs
from nemo_rl.objectives.truncation import WHOLE, Truncation
from nemo_rl.objectives.value import ScalarOutputs
from nemo_rl.training.passes import InOrder, Pass, Passes, arithmetic
from nemo_rl.training.pytorch.routing import Balance, ExpertCounts, RouterWatch, update_biases

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
        anywhere: whether something is true on any rank, a collective call; None where there is no other.
        pipeline: runs the micro-batches where the layers are on several ranks; None runs them here, one by one.
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
    anywhere: Callable[[bool], bool] | None = None
    pipeline: Passes | None = None
    autocast: torch.dtype | None = None
    truncation: Truncation = WHOLE
    teachers: tuple[LogitHead, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def passes(self) -> Passes:
        """What runs the micro-batches."""
        return self.pipeline or InOrder(self.model, self.autocast)

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
        needed = self.passes.count(len(parts))
        missing = (needed if self.agree is None else self.agree(needed)) - len(parts)
        for indices in parts:
            yield batch.select(indices), True
        if missing:
            padding = padding_micro_batch(batch, max_tokens=max_tokens, share_prefixes=share, min_shared=min_shared)
            yield from [(padding, False)] * missing

    def stream(self, micro_batch: TokenBatch) -> Stream:
        """Lay a micro-batch out as the model sees it."""
        return build_stream(micro_batch, share_prefixes=self._shares, min_shared=self.min_shared)

    def outputs(self, hidden: Hidden, stream: Stream, reads: Reads, *, with_entropy: bool = True) -> Outputs:
        """What is asked of the M loss tokens of a stream, from its last hidden states.

        Raises:
            BackendError: the model has no head for what is read.
        """
        with self._arithmetic():
            match reads, self.model:
                case "logprobs", CausalLM() as model:
                    return self._token_outputs(model, hidden, stream, with_entropy)
                case "distribution", CausalLM() as model:
                    rows = hidden.rows(stream.predictor)
                    return DistributionOutputs(rows, self._logits(model), self.teachers)
                case "values" | "head_values", ScalarModel(score=head) | CausalLM(value_head=nn.Linear() as head):
                    return ScalarOutputs(scalar_values(head, hidden.rows(stream.predictor)))
                case _:
                    raise BackendError(
                        f"the objective reads {reads}, for which {type(self.model.module).__name__} has no head; train "
                        "a model of the right kind"
                    )

    def _token_outputs(self, model: CausalLM, hidden: Hidden, stream: Stream, with_entropy: bool) -> TokenOutputs:
        head = model.token_head(
            temperature=self.temperature,
            chunk_size=self.chunk_size,
            truncation=self.truncation,
            with_entropy=with_entropy,
        )
        predictor, target, place = _distinct(stream)
        weight, bias = model.head_rows()
        logprobs, entropy = hidden.scores(predictor, target, partial(_score, head, weight, bias))
        if place is not None:
            place = moved(place, self.device)
            logprobs, entropy = logprobs[place], entropy[place]
        critic = model.value_head if with_entropy else None
        values = None if critic is None else scalar_values(critic, hidden.rows(stream.predictor))
        return TokenOutputs(logprobs, entropy, values)

    def _logits(self, model: CausalLM) -> Callable[[Tensor], Tensor]:
        """The LM head as an objective calls it, outside of `score`."""

        def logits(rows: Tensor) -> Tensor:
            with self._arithmetic():
                return model.logits(rows)

        return logits

    def topk_logprobs(self, rows: Tensor, k: int, vocab_size: int | None = None) -> tuple[Tensor, Tensor]:
        """The k likeliest tokens after hidden states [m, H] of a language model: log-probabilities [m, k] and ids."""
        assert isinstance(self.model, CausalLM)  # no other has distributions
        with self._arithmetic():
            head = self.model.logit_head()
            return head.topk(rows, k, temperature=self.temperature, vocab_size=vocab_size)

    def _arithmetic(self) -> torch.autocast:
        return arithmetic(self.model, self.autocast)


def _distinct(stream: Stream) -> tuple[Tensor, Tensor, Tensor | None]:
    """Predictor and target of the predictions that are asked for, and which of them each of the M is.

    Equal answers ask for the same ones, and each goes through the head once; None if they are all different.
    """
    if (stream.predictor.diff() > 0).all():
        return stream.predictor, stream.target, None
    num_targets = int(stream.target.max()) + 1
    pairs, place = (stream.predictor * num_targets + stream.target).unique(return_inverse=True)
    if len(pairs) == len(place):
        return stream.predictor, stream.target, None
    return pairs // num_targets, pairs % num_targets, place


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
        balance: how the experts of a mixture are kept equally busy (see `Balance.check`), or None.

    Returns:
        The objective's metrics, `update`'s, `loss`, the tokens given, with loss and computed, and how well they were
        packed: `packing_fill`, computed tokens per token of budget, and `tokens_computed_per_token`, computed tokens
        per token that must enter the model. Of a mixture of experts also what a `RouterWatch` tells.

    Raises:
        DataError: no token of the batch, or of any rank's that `scorer.agree` speaks for, carries loss.
        BackendError: the loss is not finite; no weight has changed then.
    """
    counts = None if balance is None else balance.total(_count_experts(scorer, batch, objective, max_tokens))
    watch = RouterWatch(scorer.model.module, balance.coefficient if balance else 0.0, counts)
    parts: list[Metrics] = []
    losses: list[Tensor] = []

    def finish(micro_batch: TokenBatch, counts: bool, stream: Stream, hidden: Hidden) -> Tensor:
        loss, metrics = _loss(scorer, micro_batch, objective, stream, hidden)
        if counts:
            losses.append(loss.detach())
            parts.append(metrics)
        return loss

    if not scorer.passes.train(_passes(scorer, batch, objective, max_tokens, finish, watch)):
        raise DataError("no token of the batch carries loss; drop such a batch before training on it")
    loss = _sum(losses)
    _check_finite(loss.value, scorer.anywhere)
    updated = update()
    if balance is not None and counts is not None and balance.bias_rate:
        update_biases(scorer.model.module, counts, balance.bias_rate)
    packed = _packed(parts, batch, max_tokens, scorer.min_shared)
    return merge([*parts, *watch.metrics, updated, {"loss": loss}, packed])


def _check_finite(loss: float, anywhere: Callable[[bool], bool] | None) -> None:
    """Raise on every rank if the loss of one is not finite, so that none waits for another."""
    is_own = not math.isfinite(loss)
    if is_own if anywhere is None else anywhere(is_own):
        said = f"the loss is {loss}" if is_own else "the loss of another rank is not finite"
        raise BackendError(f"{said}; lower the learning rate or look at the rollouts of this step")


def evaluate_step(scorer: Scorer, batch: TokenBatch, objective: Objective, *, max_tokens: int) -> Metrics:
    """The objective's metrics and the loss of a batch, cut as in training; no gradient."""

    def finish(micro_batch: TokenBatch, counts: bool, stream: Stream, hidden: Hidden) -> tuple[Tensor, Metrics] | None:
        loss, metrics = _loss(scorer, micro_batch, objective, stream, hidden)
        return (loss, metrics) if counts else None

    run = [found for found in scorer.passes.score(_passes(scorer, batch, objective, max_tokens, finish)) if found]
    return merge([*(metrics for _, metrics in run), {"loss": _sum([loss for loss, _ in run])}])


def _sum(losses: list[Tensor]) -> Sum:
    """Add up the losses of the micro-batches, in one transfer from the device: each would have to wait for it."""
    return Sum(sum(torch.stack(losses).tolist())) if losses else Sum(0.0)


def _passes(
    scorer: Scorer,
    batch: TokenBatch,
    objective: Objective,
    max_tokens: int,
    finish: Callable[[TokenBatch, bool, Stream, Hidden], Any],
    watch: RouterWatch | ExpertCounts | None = None,
) -> Iterator[Pass]:
    for micro_batch, counts in scorer.cut(batch, max_tokens):
        stream = scorer.stream(micro_batch)
        within = nullcontext
        if watch is not None and scorer.model.takes_plans:  # on padded rows, routers see padding too
            within = partial(watch.over, stream.predictor, counts)
        yield Pass(stream, partial(finish, micro_batch, counts, stream), objective.reads != "head_values", within)


def _count_experts(scorer: Scorer, batch: TokenBatch, objective: Objective, max_tokens: int) -> Tensor:
    """How often the predictions of the batch choose each expert of each layer here: int64 [layers, E]."""

    def finish(*_: object) -> None: ...

    counts = ExpertCounts(scorer.model.module)
    for _ in scorer.passes.score(_passes(scorer, batch, objective, max_tokens, finish, counts)):
        pass
    return counts.stacked()


def _loss(
    scorer: Scorer, micro_batch: TokenBatch, objective: Objective, stream: Stream, hidden: Hidden
) -> tuple[Tensor, Metrics]:
    """The loss of a micro-batch, a part of that of the batch, and its metrics but for the loss."""
    outputs = scorer.outputs(hidden, stream, objective.reads)
    tokens = micro_batch.at(stream.token_index).to(scorer.device)
    token_loss, metrics = objective(outputs, tokens)
    loss = (tokens.token_columns["loss_weights"] * token_loss).sum()
    counted: Metrics = {
        "tokens_computed": Sum(len(stream.input_ids)),
        "loss_tokens": Sum(len(stream.target)),
        "micro_batches": Sum(1),
    }
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
    found: list[Tensor] = []  # fetched at the end: the device never waits for the host
    places: list[Tensor] = []
    for outputs, where in read_tokens(scorer, batch, reads, max_tokens=max_tokens):
        assert not isinstance(outputs, DistributionOutputs)  # not what was asked for
        found.append(outputs.values if isinstance(outputs, ScalarOutputs) else outputs.policy_logprobs)
        places.append(where)
    if found:
        scores[torch.cat(places)] = torch.cat(found).float().cpu()
    return scores


def read_tokens(
    scorer: Scorer, batch: TokenBatch, reads: Reads, *, max_tokens: int
) -> Iterator[tuple[Outputs, Tensor]]:
    """Run the model over a batch without gradient.

    Yields:
        Of each micro-batch the outputs for its M loss tokens, and int64 [M] where these stand in the batch.
    """
    numbered = batch.with_columns(position=torch.arange(batch.num_tokens))

    def finish(micro_batch: TokenBatch, counts: bool, stream: Stream, hidden: Hidden) -> tuple[Outputs, Tensor] | None:
        where = micro_batch.token_columns["position"][stream.token_index]
        return (scorer.outputs(hidden, stream, reads, with_entropy=False), where) if counts else None

    def passes() -> Iterator[Pass]:
        for micro_batch, counts in scorer.cut(numbered, max_tokens):
            stream = scorer.stream(micro_batch)
            yield Pass(stream, partial(finish, micro_batch, counts, stream))

    yield from filter(None, scorer.passes.score(passes()))


def _score(head: TokenHead, weight: Tensor, bias: Tensor | None, rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return head.score(rows, weight, target, bias=bias)
