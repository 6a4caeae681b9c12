"""Ranks get every sequence once and about equal work, and their answers come together in the batch's order."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.config.model_shapes import ModelShape
from nemo_rl.data.assignment import assign, join
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.cost import ComputeCost, costs
from nemo_rl.errors import DataError
from tiny_sequences import answers, batches, make_batch, needed

ATTENTION = ComputeCost(per_token=100, per_pair=1)


def lone(*lengths: int) -> TokenBatch:
    """Sequences that compute so many tokens each and share nothing, every one a group."""
    return make_batch([answers([1000 * i + n for n in range(length)], [0]) for i, length in enumerate(lengths)])


@settings(deadline=None, max_examples=100)
@given(batch=batches(), num_ranks=st.integers(1, 6), whole_groups=st.booleans(), share_prefixes=st.booleans())
def test_every_sequence_is_on_one_rank_in_order_and_no_rank_is_idle_without_need(
    batch: TokenBatch, num_ranks: int, whole_groups: bool, share_prefixes: bool
) -> None:
    ranks = assign(batch, num_ranks, ATTENTION, whole_groups=whole_groups, share_prefixes=share_prefixes, min_shared=1)
    assert len(ranks) == num_ranks
    assert sorted(torch.cat(ranks).tolist()) == list(range(batch.num_sequences))
    assert all(a < b for rank in ranks for a, b in pairwise(rank.tolist()))
    homes = [set(batch.group_ids[rank].tolist()) for rank in ranks]
    num_groups = len(batch.group_ids.unique())
    if whole_groups:
        assert sum(map(len, homes)) == num_groups
        assert sum(map(bool, homes)) == min(num_ranks, num_groups)
    else:
        assert sum(map(bool, homes)) == num_ranks or batch.num_sequences < num_ranks
    loud = [any(needed(batch)[i] for i in rank.tolist()) for rank in ranks]
    num_loud = len({batch.group_ids.tolist()[i] if whole_groups else i for i, kept in enumerate(needed(batch)) if kept})
    assert sum(loud) == min(num_ranks, num_loud)


@settings(deadline=None, max_examples=100)
@given(batch=batches(), num_ranks=st.integers(1, 6), whole_groups=st.booleans())
def test_per_token_answers_come_back_in_the_order_of_the_batch(
    batch: TokenBatch, num_ranks: int, whole_groups: bool
) -> None:
    ranks = assign(batch, num_ranks, ATTENTION, whole_groups=whole_groups)
    numbered = batch.with_columns(number=torch.arange(batch.num_tokens), wide=torch.rand(batch.num_tokens, 3))
    parts = [numbered.select(rank) for rank in ranks]
    for name in ("number", "wide"):
        joined = join(batch, [part.token_columns[name] for part in parts], ranks)
        assert torch.equal(joined, numbered.token_columns[name])


def test_a_long_sequence_outweighs_its_tokens_in_short_ones() -> None:
    batch = lone(400, *[100] * 8)
    by_tokens, by_work = (assign(batch, 2, cost, whole_groups=True) for cost in (ComputeCost(), ATTENTION))
    assert sorted(len(rank) for rank in by_tokens) == [3, 6]
    assert [len(rank) for rank in by_work] == [8, 1]  # 8 x (10,000 + 5,050) and 40,000 + 80,200


def test_costs_count_a_shared_prefix_once_and_every_pair_that_is_seen() -> None:
    batch = make_batch([answers(list(range(10)), [20, 21, 22], [30])])
    (tokens,) = costs(batch, [[0, 1]], ComputeCost())
    (pairs,) = costs(batch, [[0, 1]], ComputeCost(0, 1))
    assert tokens == 10 + 2  # what the last token of an answer sees is never asked
    assert pairs == 55 + 11 + 12
    assert costs(batch, [[0], [1]], ComputeCost(1, 1)) == [12 + 78, 10 + 55]
    assert costs(batch, [[0, 1]], ComputeCost(0, 1), share_prefixes=False) == [78 + 55]


def test_the_cost_of_a_model_is_its_operations_by_hand() -> None:
    shape = ModelShape(hidden=8, layers=2, intermediate=16, heads=4, kv_heads=2, head_dim=2, vocab=100, tied=False)
    layer = 8 * (8 + 4 + 4 + 8) + 3 * 8 * 16 + 2 * 8  # q, k, v, o; gate, up, down; norms
    assert ComputeCost.of_model(shape) == ComputeCost(2 * (2 * layer + 8), 4 * 2 * 4 * 2)


def test_skewed_lengths_are_within_2_percent_of_even_work() -> None:
    cost = ComputeCost(per_token=500, per_pair=1)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randn(256, generator=generator).exp().mul(64).ceil().int().tolist()
    batch = lone(*lengths)
    ranks = assign(batch, 4, cost, whole_groups=True)
    loads = costs(batch, [rank.tolist() for rank in ranks], cost)
    assert max(loads) <= 1.02 * sum(loads) / 4


def test_a_group_beyond_a_fair_share_is_divided_where_it_may_be() -> None:
    batch = make_batch([answers(list(range(20)), *([100 + i] * 11 for i in range(8))), answers([7], [8, 9])])
    kept = assign(batch, 2, ComputeCost(), whole_groups=True)
    assert [len(rank) for rank in kept] == [8, 1]
    divided = assign(batch, 2, ComputeCost(), whole_groups=False)
    assert sorted(len(rank) for rank in divided) == [4, 5]


def test_no_rank_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="it takes at least 1"):
        assign(lone(3), 0, ATTENTION, whole_groups=True)
