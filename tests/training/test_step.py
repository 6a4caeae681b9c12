"""However a batch is cut, packed, shared or ordered, a step is that of the plain loop over single sequences."""

import copy
from collections.abc import Mapping
from functools import cache
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_rl.data.assignment import assign, join
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.cost import ComputeCost
from nemo_rl.errors import BackendError, DataError
from nemo_rl.metrics import Mean, Metrics, Sum, merge, scalars
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.objectives.logprobs import Reads, TokenOutputs
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.training.step import Scorer, score_tokens, train_step
from tiny_batches import plain_logprobs, plain_policy_loss, rollout_batch
from tiny_models import tiny_model

TEMPERATURE = 0.8
OBJECTIVE = ClippedPolicyObjective(kl_weight=0.1)
PLAIN = tiny_model("qwen3", tie_word_embeddings=True)
MODEL = CausalLM.wrap(copy.deepcopy(PLAIN))
BATCH = rollout_batch(PLAIN, temperature=TEMPERATURE)


@cache
def plain_step() -> tuple[float, Mapping[str, Tensor]]:
    """The loss and every parameter's gradient by plain Transformers and autograd."""
    loss = plain_policy_loss(plain_logprobs(PLAIN, BATCH, temperature=TEMPERATURE), BATCH)
    names, parameters = zip(*PLAIN.named_parameters(), strict=True)
    return float(loss.detach()), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def nothing() -> Metrics:
    return {"updates": Sum(1)}


@settings(max_examples=25, deadline=None)
@given(
    max_tokens=st.sampled_from([1, 30, 47, 80, 10_000]),
    share_prefixes=st.booleans(),
    min_shared=st.integers(1, 12),
    chunk_size=st.sampled_from([1, 7, 256]),
    data=st.data(),
)
def test_every_way_to_cut_pack_share_and_order_a_batch_gives_the_plain_gradients(
    max_tokens: int, share_prefixes: bool, min_shared: int, chunk_size: int, data: st.DataObject
) -> None:
    groups = data.draw(st.permutations(range(3)), label="groups")
    order = [3 * group + member for group in groups for member in data.draw(st.permutations(range(3)))]
    scorer = Scorer(MODEL, TEMPERATURE, chunk_size, share_prefixes, min_shared)
    MODEL.module.zero_grad()
    metrics = scalars(train_step(scorer, BATCH.select(order), OBJECTIVE, max_tokens=max_tokens, update=nothing))
    loss, gradients = plain_step()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    for name, parameter in MODEL.module.named_parameters():
        assert parameter.grad is not None, name
        difference, norm = (parameter.grad - gradients[name]).norm(), gradients[name].norm()
        assert difference <= 2e-5 * norm, f"{name}: {difference / norm:.1e}"
    assert metrics["updates"] == 1
    assert metrics["loss_tokens"] == BATCH.token_columns["loss_mask"].sum()
    assert metrics["tokens"] == BATCH.num_tokens
    assert max_tokens == 1 or metrics["largest_micro_batch"] <= max_tokens
    assert metrics["micro_batches"] == {1: 9, 10_000: 1}.get(max_tokens, metrics["micro_batches"])


def test_computed_tokens_are_counted_as_computed() -> None:
    shared = train_step(Scorer(MODEL), BATCH, OBJECTIVE, max_tokens=10_000, update=nothing)
    plain = train_step(Scorer(MODEL, share_prefixes=False), BATCH, OBJECTIVE, max_tokens=10_000, update=nothing)
    # prompts of 9, 15 and 20 tokens (6 of them common, too few to share), answers of 2, 6 and 11, last token left out
    assert shared["tokens_computed"] == Sum(9 + 15 + 20 + 2 * (1 + 5 + 10) + (1 + 10))
    assert plain["tokens_computed"] == Sum(3 * (9 + 15 + 20) + 2 * (1 + 5 + 10) + (1 + 1 + 10))


@pytest.mark.parametrize("max_tokens", [1, 50, 10_000])
def test_scores_are_the_plain_logprobs_and_0_where_no_loss_is(max_tokens: int) -> None:
    silent = BATCH.token_columns["loss_mask"] & (BATCH.sequence_ids() != 4)
    batch = BATCH.with_columns(loss_mask=silent)
    scores = score_tokens(Scorer(MODEL, temperature=TEMPERATURE), batch, max_tokens=max_tokens)
    expected = plain_logprobs(PLAIN, batch, temperature=TEMPERATURE).detach() * silent
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-5)
    assert not scores.requires_grad
    nobody = batch.with_columns(loss_mask=torch.zeros_like(silent))
    assert not score_tokens(Scorer(MODEL), nobody, max_tokens=max_tokens).any()


class Broken:
    """An objective that takes any advantage."""

    reads: ClassVar[Reads] = "logprobs"

    def __call__(self, outputs: TokenOutputs, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        return outputs.policy_logprobs * tokens.token_columns["advantages"], {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(value: float) -> None:
    advantages = BATCH.token_columns["advantages"].clone()
    advantages[BATCH.token_columns["loss_mask"].nonzero()[-1]] = value  # in the last micro-batch
    updates: list[int] = []

    def update() -> Metrics:
        updates.append(1)
        return {}

    with pytest.raises(BackendError, match=r"the loss is -?(nan|inf); lower the learning rate"):
        train_step(Scorer(MODEL), BATCH.with_columns(advantages=advantages), Broken(), max_tokens=30, update=update)
    assert not updates


def test_a_batch_without_a_loss_token_is_refused_before_the_update() -> None:
    batch = BATCH.with_columns(loss_mask=torch.zeros(BATCH.num_tokens, dtype=torch.bool))
    with pytest.raises(DataError, match="no token of the batch carries loss"):
        train_step(Scorer(MODEL), batch, OBJECTIVE, max_tokens=30, update=lambda: pytest.fail("it was updated"))


@pytest.mark.parametrize("max_tokens", [30, 10_000])
def test_padding_micro_batches_change_no_gradient_and_no_metric(max_tokens: int) -> None:
    found: list[tuple[Metrics, list[Tensor]]] = []
    for scorer in (Scorer(MODEL), Scorer(MODEL, agree=lambda count: count + 3)):
        MODEL.module.zero_grad()
        passes = 0

        def count(*_: object) -> None:
            nonlocal passes
            passes += 1

        with MODEL.trunk.register_forward_hook(count):
            metrics = train_step(scorer, BATCH, OBJECTIVE, max_tokens=max_tokens, update=nothing)
        assert passes == metrics["micro_batches"].value + (0 if scorer.agree is None else 3)
        found.append((metrics, [p.grad.clone() for p in MODEL.module.parameters() if p.grad is not None]))
    (plain, gradients), (padded, same) = found
    assert plain == padded
    for one, other in zip(gradients, same, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    scores = [
        score_tokens(scorer, BATCH, max_tokens=30) for scorer in (Scorer(MODEL), Scorer(MODEL, agree=lambda n: 12))
    ]
    assert torch.equal(*scores)


def test_ranks_that_run_equally_many_micro_batches_add_up_to_the_plain_gradients() -> None:
    """One rank has no token with loss left and only keeps in step with the others."""
    silent = BATCH.token_columns["loss_mask"] & (BATCH.sequence_ids() < 6)
    weights = BATCH.token_columns["loss_weights"] * silent
    batch = BATCH.with_columns(loss_mask=silent, loss_weights=weights)
    MODEL.module.zero_grad()
    whole = train_step(Scorer(MODEL), batch, OBJECTIVE, max_tokens=40, update=nothing)
    gradients = [p.grad.clone() for p in MODEL.module.parameters() if p.grad is not None]
    ranks = assign(batch, 3, ComputeCost(), whole_groups=True)
    counts = [len(list(Scorer(MODEL).cut(batch.select(rank), 40))) for rank in ranks]
    assert sorted(counts)[0] == 0
    MODEL.module.zero_grad()
    scorer = Scorer(MODEL, agree=lambda _: max(counts))
    parts = [train_step(scorer, batch.select(rank), OBJECTIVE, max_tokens=40, update=dict) for rank in ranks]
    for gradient, parameter in zip(gradients, MODEL.module.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
    merged, expected = scalars(merge(parts)), scalars(whole)
    for name in ("loss", "tokens", "loss_tokens", "policy_kl", "entropy"):
        assert merged[name] == pytest.approx(expected[name], rel=1e-5), name
    joined = join(batch, [score_tokens(scorer, batch.select(rank), max_tokens=40) for rank in ranks], ranks)
    torch.testing.assert_close(joined, score_tokens(Scorer(MODEL), batch, max_tokens=40), rtol=0, atol=2e-5)


def test_a_step_reports_how_full_its_micro_batches_are_and_what_is_computed_twice() -> None:
    whole = train_step(Scorer(MODEL), BATCH, OBJECTIVE, max_tokens=200, update=nothing)
    computed = 9 + 15 + 20 + 2 * (1 + 5 + 10) + (1 + 10)
    assert whole["packing_fill"] == Mean(computed, 200)
    assert whole["tokens_computed_per_token"] == Mean(computed, computed)
    cut = train_step(Scorer(MODEL), BATCH, OBJECTIVE, max_tokens=1, update=nothing)
    assert cut["packing_fill"] == Mean(plain := 3 * (9 + 15 + 20) + 2 * (1 + 5 + 10) + (1 + 1 + 10), 9)
    assert cut["tokens_computed_per_token"] == Mean(plain, computed)
