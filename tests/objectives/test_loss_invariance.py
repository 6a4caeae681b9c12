"""Cutting, ordering or packing a batch cannot change its loss, gradient or metrics.

A weight is fixed with the global batch in view and the objective is element-wise, so the sum of weight * loss over any
partition of the tokens is the same number. Normalising inside a micro-batch breaks every test here.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.metrics import Metrics, merge, scalars
from nemo_rl.objectives.advantages import group_advantages
from nemo_rl.objectives.logprobs import TokenHead, TokenOutputs
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.objectives.weights import Reduction, loss_weights

HIDDEN, VOCABULARY = 8, 29
OBJECTIVE = ClippedPolicyObjective(kl_weight=0.05, ratio_clip_c=3.0)
HEAD = TokenHead(temperature=0.9, chunk_size=4)
type Sequence = dict[str, Tensor]


def make_sequences(lengths: list[int], seed: int) -> list[Sequence]:
    """Sequences with random columns; the first token of each is a prompt token, later ones mostly carry loss."""
    generator = torch.Generator().manual_seed(seed)

    def column(length: int) -> Tensor:
        return -torch.rand(length, generator=generator, dtype=torch.float64) * 4

    rewards = torch.rand(len(lengths), generator=generator)
    advantages = group_advantages(rewards, torch.arange(len(lengths)) // 2, normalize=False).double()
    return [
        {
            "hidden": torch.randn(length, HIDDEN, generator=generator, dtype=torch.float64),
            "token_ids": torch.randint(VOCABULARY, (length,), generator=generator),
            "loss_mask": (torch.rand(length, generator=generator) < 0.8).index_fill(0, torch.tensor([0]), False),
            "advantages": advantage.repeat(length),
            "old_logprobs": column(length),
            "reference_logprobs": column(length),
            "rollout_logprobs": column(length),
        }
        for length, advantage in zip(lengths, advantages, strict=True)
    ]


def add_weights(sequences: list[Sequence], reduction: Reduction) -> None:
    lengths = torch.tensor([0] + [len(sequence["token_ids"]) for sequence in sequences])
    mask = torch.cat([sequence["loss_mask"] for sequence in sequences])
    weights = loss_weights(mask, lengths.cumsum(0), reduction=reduction, max_response_length=12)
    for sequence, part in zip(sequences, weights.split(lengths[1:].tolist()), strict=True):
        sequence["loss_weights"] = part.double()


def run(stream: list[Sequence], weight: Tensor) -> tuple[Tensor, Metrics]:
    """Pack these sequences into one stream and return its part of the loss, as a training step would."""
    columns = {name: torch.cat([sequence[name] for sequence in stream]) for name in stream[0]}
    loss_tokens = columns["loss_mask"].nonzero().squeeze(-1)
    logprobs, entropy = HEAD(columns["hidden"], weight, loss_tokens - 1, columns["token_ids"][loss_tokens])
    counts = torch.tensor([0] + [int(sequence["loss_mask"].sum()) for sequence in stream])
    tokens = TokenBatch(
        token_ids=columns["token_ids"][loss_tokens],
        cu_seqlens=counts.cumsum(0),
        group_ids=torch.arange(len(stream)),
        token_columns={
            name: columns[name][loss_tokens]
            for name in ("advantages", "old_logprobs", "reference_logprobs", "rollout_logprobs", "loss_weights")
        },
    )
    token_loss, metrics = OBJECTIVE(TokenOutputs(policy_logprobs=logprobs, entropy=entropy), tokens)
    return (tokens.token_columns["loss_weights"] * token_loss).sum(), metrics


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=8).filter(lambda lengths: max(lengths) > 4),
    reduction=st.sampled_from(["token_mean", "sequence_mean", "constant"]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_any_partition_and_order_gives_the_same_loss_gradient_and_metrics(
    lengths: list[int], reduction: Reduction, seed: int, data: st.DataObject
) -> None:
    sequences = make_sequences(lengths, seed)
    sequences[lengths.index(max(lengths))]["loss_mask"][1] = True
    add_weights(sequences, reduction)
    order = data.draw(st.permutations(range(len(sequences))), label="order")
    home = data.draw(st.lists(st.integers(0, 3), min_size=len(order), max_size=len(order)), label="micro-batch")
    micro_batches = [[sequences[i] for i, place in zip(order, home, strict=True) if place == part] for part in range(4)]

    weight = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight.requires_grad_()
    whole, whole_metrics = run(sequences, weight)
    parts = [run(micro_batch, weight) for micro_batch in micro_batches if micro_batch]
    total = torch.stack([loss for loss, _ in parts]).sum()

    torch.testing.assert_close(total, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(total, weight), torch.autograd.grad(whole, weight), rtol=1e-10, atol=1e-12
    )
    merged = scalars(merge(metrics for _, metrics in parts))
    expected = scalars(whole_metrics)
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-9, atol=1e-12)


def test_weights_made_per_micro_batch_would_give_another_loss() -> None:
    """The test above can fail: the classic mistake of normalising every micro-batch is visible to it."""
    sequences = make_sequences([12, 3, 4], seed=0)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    add_weights(sequences, "token_mean")
    whole, _ = run(sequences, weight)
    losses: list[Tensor] = []
    for sequence in sequences:
        add_weights([sequence], "token_mean")
        losses.append(run([sequence], weight)[0])
    assert not torch.isclose(torch.stack(losses).mean(), whole, rtol=1e-3)
