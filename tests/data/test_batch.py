import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import Rollout, RolloutGroup, StopReason, Task
from nemo_rl.errors import DataError


def make_batch(group_lengths: list[list[int]]) -> TokenBatch:
    """A batch whose every token and sequence value is distinct, so that any mix-up shows."""
    lengths = torch.tensor([length for group in group_lengths for length in group], dtype=torch.int64)
    num_tokens, sizes = int(lengths.sum()), torch.tensor([len(group) for group in group_lengths], dtype=torch.int64)
    return TokenBatch(
        token_ids=torch.arange(num_tokens) * 7,
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        group_ids=torch.arange(len(group_lengths)).repeat_interleave(sizes),
        token_columns={"loss_mask": torch.arange(num_tokens) % 3 > 0, "advantages": torch.arange(num_tokens) / 10},
        sequence_columns={"rewards": torch.arange(len(lengths)) / 4},
    )


def sequences(batch: TokenBatch) -> list[tuple[list[float], ...]]:
    """The sequences one by one, sliced in the plainest way."""
    bounds = batch.cu_seqlens.tolist()
    return [
        (
            batch.token_ids[start:stop].tolist(),
            *(column[start:stop].tolist() for column in batch.token_columns.values()),
            *([column[row].item()] for column in batch.sequence_columns.values()),
            [batch.group_ids[row].item()],
        )
        for row, (start, stop) in enumerate(pairwise(bounds))
    ]


batches = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4), min_size=1, max_size=6).map(make_batch)


def rollout(tokens: list[int], reward: float, stop_reason: StopReason = "stop") -> Rollout:
    size = len(tokens)
    return Rollout(
        token_ids=torch.tensor(tokens),
        loss_mask=torch.arange(size) > 0,
        rollout_logprobs=-torch.arange(size) / 2,
        rewards={"correct": reward, "format": 0.5},
        stop_reason=stop_reason,
        policy_version=3,
    )


TASK = Task(messages=({"role": "user", "content": "What is 1 + 1?"},), environment="math", index=41)


def test_rollouts_lie_side_by_side_with_rewards_summed_and_groups_numbered_even_for_equal_prompts() -> None:
    groups = [
        RolloutGroup(TASK, (rollout([1, 2, 3], 1.0), rollout([1, 4], 0.0, "length"))),
        RolloutGroup(TASK, (rollout([1, 5, 6, 7], 0.0),)),
    ]
    batch = TokenBatch.from_rollouts(groups)
    assert batch.token_ids.tolist() == [1, 2, 3, 1, 4, 1, 5, 6, 7]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 9]
    assert batch.group_ids.tolist() == [0, 0, 1]
    assert batch.token_columns["loss_mask"].tolist() == [False, True, True, False, True, False, True, True, True]
    assert batch.token_columns["rollout_logprobs"].tolist() == [0, -0.5, -1, 0, -0.5, 0, -0.5, -1, -1.5]
    assert batch.sequence_columns["rewards"].tolist() == [1.5, 0.5, 0.5]
    assert batch.sequence_columns["truncated"].tolist() == [False, True, False]
    assert (batch.num_tokens, batch.num_sequences, batch.lengths.tolist()) == (9, 3, [3, 2, 4])


def test_a_rollout_with_columns_of_unequal_length_names_its_task() -> None:
    good = rollout([1, 2, 3], 1.0)
    torn = Rollout(good.token_ids, good.loss_mask[:2], good.rollout_logprobs, {}, "stop", 0)
    with pytest.raises(DataError, match="task 41 has 3 token_ids, 2 loss_mask and 3"):
        TokenBatch.from_rollouts([RolloutGroup(TASK, (torn,))])
    with pytest.raises(DataError, match="at least one rollout"):
        TokenBatch.from_rollouts([])


@settings(deadline=None, max_examples=60)
@given(batches, st.data())
def test_select_takes_whole_sequences_in_the_order_asked_for(batch: TokenBatch, data: st.DataObject) -> None:
    groups = [torch.nonzero(batch.group_ids == group).flatten().tolist() for group in batch.group_ids.unique().tolist()]
    order = [row for group in data.draw(st.permutations(groups)) for row in data.draw(st.permutations(group))]
    taken = batch.select(order)
    plain = sequences(batch)
    assert sequences(taken) == [plain[row] for row in order]
    # And the way back: per-token results of the part return to their places.
    back = torch.empty_like(batch.token_ids)
    back[batch.token_index(order)] = taken.token_ids
    assert torch.equal(back, batch.token_ids)


@settings(deadline=None, max_examples=60)
@given(batches, st.integers(1, 9))
def test_split_and_minibatches_cut_without_loss_and_concat_restores(batch: TokenBatch, number: int) -> None:
    parts = batch.split(number)
    minibatches = batch.minibatches(number)
    assert len(parts) == number
    assert all(1 <= part.num_sequences <= number for part in minibatches)
    for cut in (parts, minibatches):
        assert TokenBatch.concat(cut).to_bytes() == batch.to_bytes()
    largest = int(batch.group_ids.bincount().max())
    group_sets = [set(part.group_ids.tolist()) for part in minibatches]
    if number >= largest:
        assert sum(map(len, group_sets)) == len(batch.group_ids.unique()), "a group was divided without need"


def test_minibatches_of_equal_groups_hold_exactly_the_size_asked_for() -> None:
    batch = make_batch([[3] * 4] * 6)
    assert [part.num_sequences for part in batch.minibatches(8)] == [8, 8, 8]
    assert [part.num_sequences for part in batch.minibatches(2)] == [2] * 12


def test_at_keeps_chosen_tokens_of_every_sequence_with_all_columns_aligned() -> None:
    batch = make_batch([[3, 2], [0, 4]])
    view = batch.at(torch.tensor([2, 0, 7, 8]))
    assert view.cu_seqlens.tolist() == [0, 2, 2, 2, 4]
    assert view.token_ids.tolist() == [14, 0, 49, 56]
    assert torch.equal(view.token_columns["advantages"], batch.token_columns["advantages"][[2, 0, 7, 8]])
    assert view.sequence_columns["rewards"] is batch.sequence_columns["rewards"]
    assert view.per_token(torch.tensor([1, 2, 3, 4])).tolist() == [1, 1, 4, 4]
    assert view.sequence_ids().tolist() == [0, 0, 3, 3]
    with pytest.raises(DataError, match="sort token_index by sequence"):
        batch.at(torch.tensor([4, 0]))


def test_bytes_and_pickle_carry_every_column_and_equal_batches_give_equal_bytes() -> None:
    batch = make_batch([[3, 2], [4]]).with_columns(old_logprobs=torch.randn(9)).with_sequence_columns(x=torch.ones(3))
    for copy in (TokenBatch.from_bytes(batch.to_bytes()), pickle.loads(pickle.dumps(batch)), batch.to("cpu")):
        assert copy.to_bytes() == batch.to_bytes()
        assert copy.token_columns.keys() == {"loss_mask", "advantages", "old_logprobs"}
        assert copy.sequence_columns.keys() == {"rewards", "x"}
        assert torch.equal(copy.token_columns["old_logprobs"], batch.token_columns["old_logprobs"])
    shuffled = TokenBatch(
        batch.token_ids,
        batch.cu_seqlens,
        batch.group_ids,
        dict(reversed(batch.token_columns.items())),
        batch.sequence_columns,
    )
    assert shuffled.to_bytes() == batch.to_bytes()
    with pytest.raises(DataError, match="hold no TokenBatch"):
        TokenBatch.from_bytes(batch.to_bytes()[:-5])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"token_ids": torch.zeros(5)}, "token_ids is torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, "run from 0 to the 5 tokens"),
        ({"cu_seqlens": torch.tensor([0, 6, 5])}, "cu_seqlens decreases"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, "run from 0"),
        ({"group_ids": torch.tensor([0])}, "1 group_ids for 2 sequences"),
        ({"cu_seqlens": torch.tensor([0, 1, 2, 5]), "group_ids": torch.tensor([0, 1, 0])}, "tears a group apart"),
        ({"token_columns": {"advantages": torch.zeros(4)}}, "token column 'advantages'.*5 rows"),
        ({"token_columns": {"advantages": torch.zeros(())}}, "token column 'advantages'"),
        ({"token_columns": {"loss_mask": torch.ones(5)}}, "'loss_mask'.*must be bool"),
        ({"sequence_columns": {"rewards": torch.zeros(5)}}, "sequence column 'rewards'.*2 values"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_a_sentence(change: dict[str, torch.Tensor], sentence: str) -> None:
    good = {
        "token_ids": torch.arange(5),
        "cu_seqlens": torch.tensor([0, 2, 5]),
        "group_ids": torch.tensor([0, 1]),
    }
    TokenBatch(**good)
    with pytest.raises(DataError, match=sentence):
        TokenBatch(**{**good, **change})


def test_a_batch_without_sequences_is_a_batch() -> None:
    empty = make_batch([[2], [3]]).select([])
    assert (empty.num_sequences, empty.num_tokens, empty.minibatches(4)) == (0, 0, [])
    assert TokenBatch.from_bytes(empty.to_bytes()).num_sequences == 0
    assert [part.num_sequences for part in empty.split(2)] == [0, 0]


def test_a_token_may_have_several_values() -> None:
    """However sequences are dealt, the rows of a wide column stay with their tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 1, 4, 2, 5, 2])
    batch = TokenBatch(
        torch.arange(17), torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), torch.tensor([0, 0, 1, 2, 2, 3])
    )
    wide = torch.rand(17, 3, generator=generator)
    batch = batch.with_columns(wide=wide)
    parts = [
        *batch.split(3),
        *batch.minibatches(2),
        pickle.loads(pickle.dumps(batch)),
        batch.to("cpu"),
    ]
    for part in parts:
        assert torch.equal(part.token_columns["wide"], wide[part.token_ids])
    with pytest.raises(DataError, match="token column 'wide'"):
        batch.with_columns(wide=wide[:5])
    with pytest.raises(DataError, match="sequence column 'wide'"):
        batch.with_sequence_columns(wide=wide[:6])
