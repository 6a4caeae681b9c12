"""Micro-batches: every sequence once, within the budget, groups whole, and hardly a token computed twice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.config.schema.policy import PackingAlgorithm
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.bins import PACKERS
from nemo_rl.data.cost import useful_tokens
from nemo_rl.data.micro_batches import micro_batches, padding_micro_batch
from nemo_rl.data.packing import build_stream
from nemo_rl.objectives.preference import pair_indices
from tiny_sequences import Sequences, answers, batches, make_batch, needed, size


@settings(max_examples=150, deadline=None)
@given(batch=batches(), max_tokens=st.integers(1, 40), share_prefixes=st.booleans(), min_shared=st.integers(1, 5))
@pytest.mark.parametrize("algorithm", PACKERS)
def test_micro_batches_hold_every_sequence_once_within_the_budget_and_keep_groups_whole(
    algorithm: PackingAlgorithm, batch: TokenBatch, max_tokens: int, share_prefixes: bool, min_shared: int
) -> None:
    numbered = batch.with_sequence_columns(number=torch.arange(batch.num_sequences))
    options = {"share_prefixes": share_prefixes, "min_shared": min_shared}
    parts = list(micro_batches(numbered, max_tokens=max_tokens, algorithm=algorithm, **options))
    numbers = [part.sequence_columns["number"].tolist() for part in parts]
    together = [number for found in numbers for number in found]
    assert sorted(together) == [i for i, tokens in enumerate(needed(batch)) if tokens]
    if algorithm == "concatenative":
        assert together == sorted(together)
    for part in parts:
        assert part.num_sequences == 1 or size(part, **options) <= max_tokens
    for group in batch.group_ids.unique().tolist():
        members = [i for i in (batch.group_ids == group).nonzero().flatten().tolist() if needed(batch)[i]]
        if members and size(batch.select(members), **options) <= max_tokens:
            assert sum(not set(members).isdisjoint(found) for found in numbers) == 1


def test_a_group_beyond_the_budget_still_shares_its_prompt_in_every_part() -> None:
    group = answers(list(range(100)), *([200 + i] * 11 for i in range(8)))
    parts = list(micro_batches(make_batch([group]), max_tokens=150))
    assert [part.num_sequences for part in parts] == [5, 3]
    assert [size(part) for part in parts] == [150, 130]


def test_a_sequence_beyond_the_budget_goes_alone() -> None:
    batch = make_batch([answers([1], [2]), answers(list(range(50)), [60]), answers([3], [4])])
    found = {
        algorithm: [part.num_tokens for part in micro_batches(batch, max_tokens=10, algorithm=algorithm)]
        for algorithm in PACKERS
    }
    assert found == {
        "concatenative": [2, 51, 2],
        "first_fit_decreasing": [51, 4],
        "modified_first_fit_decreasing": [51, 4],
    }


def test_pieces_of_a_group_meet_again_only_while_they_share_enough() -> None:
    """A run of 16 is shared by three answers; with an answer that forks after 9, only those 9 would be."""
    run = list(range(100, 116))
    long = ([*run, *range(200, 216)], [False] * 31 + [True])
    late = [([*run, 300 + i, 0], [False] * 17 + [True]) for i in range(3)]
    early = ([*run[:9], 400, 0], [False] * 10 + [True])
    batch = make_batch([[*late, long, early]])
    assert [size(batch.select(part)) for part in ([0, 1, 2], [3], [4], [0, 1, 2, 4])] == [19, 31, 10, 34]
    parts = list(micro_batches(batch, max_tokens=31))
    assert sorted(part.num_sequences for part in parts) == [1, 1, 3]
    assert all(size(part) <= 31 for part in parts)


def test_a_sequence_without_loss_is_in_no_micro_batch() -> None:
    silent: Sequences = [([7, 8, 9], [False] * 3), ([], [])]
    batch = make_batch([silent, answers([1, 2], [3, 4]), silent])
    (only,) = micro_batches(batch, max_tokens=100)
    assert only.token_ids.tolist() == [1, 2, 3, 4]
    assert not list(micro_batches(make_batch([silent]), max_tokens=100))


def test_padding_is_the_smallest_piece_and_weighs_nothing() -> None:
    batch = make_batch([answers([1, 2, 3], [4, 5], [6]), answers([7], [8, 9, 9, 9]), answers(list(range(9)), [1])])
    padding = padding_micro_batch(batch.with_columns(loss_weights=torch.ones(batch.num_tokens)), max_tokens=10)
    assert padding.token_ids.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 6] or padding.token_ids.tolist() == [7, 8, 9, 9, 9]
    assert size(padding) == min(size(batch.select([0, 1])), size(batch.select([2])))
    assert not padding.token_columns["loss_weights"].any()


def test_padding_of_a_batch_without_loss_predicts_last_tokens() -> None:
    silent = make_batch([[([7], [False])], [([7, 8, 9], [False] * 3), ([7, 8], [False] * 2)]])
    padding = padding_micro_batch(silent, max_tokens=10)
    assert padding.token_columns["loss_mask"].tolist() == [False, False, True, False, True]


def test_padding_of_a_batch_that_predicts_nothing_is_a_pair_with_its_columns() -> None:
    silent = make_batch([[([7], [False])]])
    columns = {"teacher_hidden": torch.ones(1, 5, dtype=torch.bfloat16), "advantages": torch.ones(1)}
    silent = silent.with_columns(**columns).with_sequence_columns(
        chosen=torch.tensor([False]), teacher=torch.tensor([3])
    )
    for empty in (silent, silent.select(torch.empty(0, dtype=torch.int64))):
        padding = padding_micro_batch(empty, max_tokens=10)
        assert len(pair_indices(padding)[0]) == 1
        assert padding.token_columns.keys() == {"loss_mask", "loss_weights", *columns}
        assert padding.token_columns["teacher_hidden"].shape == (4, 5)
        assert padding.token_columns["teacher_hidden"].dtype == torch.bfloat16
        assert not any(padding.token_columns[name].any() for name in ("loss_weights", *columns))
        assert padding.sequence_columns["teacher"].tolist() == [0, 0]
        assert len(build_stream(padding).target) == 2


def log_normal_batch(group_size: int, prompt: int, response: int, num_groups: int, seed: int) -> TokenBatch:
    """Groups of answers whose lengths are log-normal with sigma 1 and this mean, behind prompts of a set length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randn(num_groups * group_size, generator=generator).sub(0.5).exp().mul(response).ceil().int()
    rows = iter(torch.randint(10**6, (int(length),), generator=generator).tolist() for length in lengths)
    prompts = (torch.randint(10**6, (prompt,), generator=generator).tolist() for _ in range(num_groups))
    return make_batch([answers(start, *(next(rows) for _ in range(group_size))) for start in prompts])


@pytest.mark.parametrize("algorithm", PACKERS)
@pytest.mark.parametrize("group_size", [1, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_at_most_3_percent_of_the_tokens_are_computed_twice_on_skewed_lengths(
    algorithm: PackingAlgorithm, group_size: int, seed: int
) -> None:
    """Prompts of 32 tokens, answers of 256 on average; groups of 8 are larger than the budget and have to be cut."""
    batch = log_normal_batch(group_size, 32, 256, 256 // group_size, seed)
    budget = 4 * batch.num_tokens // batch.num_sequences
    sizes = [size(part) for part in micro_batches(batch, max_tokens=budget, algorithm=algorithm)]
    computed, useful = sum(sizes), useful_tokens(batch)
    assert useful <= computed <= 1.03 * useful
    assert (computed == useful) == (group_size == 1)
    if algorithm != "concatenative":
        assert computed >= 0.9 * budget * len(sizes)
