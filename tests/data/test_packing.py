"""A stream holds what the sequences hold, sees what the sequences saw, and holds nothing twice that it can share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.packing import SegmentTree, Stream, build_stream, micro_batches, prompt_stream
from nemo_rl.errors import DataError

type Sequences = list[tuple[list[int], list[bool]]]


def make_batch(groups: list[Sequences]) -> TokenBatch:
    sequences = [sequence for group in groups for sequence in group]
    lengths = torch.tensor([len(tokens) for tokens, _ in sequences])
    return TokenBatch(
        token_ids=torch.tensor([token for tokens, _ in sequences for token in tokens], dtype=torch.int64),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        group_ids=torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups])),
        token_columns={"loss_mask": torch.tensor([m for _, mask in sequences for m in mask], dtype=torch.bool)},
    )


def answers(prompt: list[int], *responses: list[int]) -> Sequences:
    """One group: every response is trained on, the prompt is not."""
    return [(prompt + response, [False] * len(prompt) + [True] * len(response)) for response in responses]


def needed(batch: TokenBatch) -> list[tuple[int, ...]]:
    """Per sequence the tokens before its last loss token, in the plainest way."""
    found = []
    for tokens, mask in zip(*(x.split(batch.lengths.tolist()) for x in (batch.token_ids, mask_of(batch))), strict=True):
        last = max(mask.nonzero().flatten().tolist(), default=0)
        found.append(tuple(tokens[:last].tolist()))
    return found


def mask_of(batch: TokenBatch) -> Tensor:
    return batch.token_columns["loss_mask"]


def visible(tree: SegmentTree, query: int) -> Tensor:
    """The keys that a query sees: causal, aligned bottom-right."""
    segment = int(torch.searchsorted(tree.cu_seqlens_q, query, right=True)) - 1
    keys = tree.kv_index[tree.cu_seqlens_k[segment] : tree.cu_seqlens_k[segment + 1]]
    queries_after = int(tree.cu_seqlens_q[segment + 1]) - 1 - query
    return keys[: len(keys) - queries_after]


def size(batch: TokenBatch, **options: bool | int) -> int:
    return len(build_stream(batch, **options).input_ids)


@st.composite
def batches(draw: st.DrawFn) -> TokenBatch:
    """Groups over three tokens, so that prefixes, duplicates and sequences inside others are everywhere."""
    token = st.integers(0, 2)
    groups: list[Sequences] = []
    for _ in range(draw(st.integers(1, 4))):
        stems = draw(st.lists(st.lists(token, min_size=1, max_size=8), min_size=1, max_size=2))
        group: Sequences = []
        for _ in range(draw(st.integers(1, 4))):
            tokens = draw(st.sampled_from(stems)) + draw(st.lists(token, max_size=6))
            mask = draw(st.lists(st.booleans(), min_size=len(tokens) - 1, max_size=len(tokens) - 1))
            group.append((tokens, [False, *mask]))
        groups.append(group)
    groups.append(answers([0, 1], [2]))  # so that at least one token carries loss
    return make_batch(groups)


@settings(max_examples=150, deadline=None)
@given(batch=batches(), share_prefixes=st.booleans(), min_shared=st.integers(1, 5))
def test_every_loss_token_is_predicted_once_from_exactly_the_tokens_before_it(
    batch: TokenBatch, share_prefixes: bool, min_shared: int
) -> None:
    stream = build_stream(batch, share_prefixes=share_prefixes, min_shared=min_shared)
    assert torch.equal(stream.token_index, mask_of(batch).nonzero().flatten())
    assert torch.equal(stream.target, batch.token_ids[stream.token_index])
    starts = batch.cu_seqlens[:-1][batch.sequence_ids()]
    for predictor, index in zip(stream.predictor.tolist(), stream.token_index.tolist(), strict=True):
        keys = visible(stream.tree, predictor)
        assert keys[-1] == predictor
        assert torch.equal(stream.input_ids[keys], batch.token_ids[int(starts[index]) : index])
        assert torch.equal(stream.position_ids[keys], torch.arange(len(keys)))


@settings(max_examples=150, deadline=None)
@given(batch=batches(), min_shared=st.integers(1, 5))
def test_sharing_starts_at_min_shared_and_never_costs_a_token(batch: TokenBatch, min_shared: int) -> None:
    stream = build_stream(batch, min_shared=min_shared)
    assert len(stream.input_ids) <= size(batch, share_prefixes=False)
    users: dict[int, set[tuple[int, ...]]] = {}
    for position, sequence in last_positions(stream, batch):
        for key in visible(stream.tree, position).tolist():
            users.setdefault(key, set()).add(sequence)
    assert users.keys() == set(range(len(stream.input_ids)))  # nothing is computed for nobody
    for segment in torch.arange(len(stream.input_ids)).split(stream.tree.cu_seqlens_q.diff().tolist()):
        sharers = users[int(segment[0])]
        assert all(users[key] == sharers for key in segment.tolist())
        assert len(sharers) == 1 or len(segment) >= min_shared


def last_positions(stream: Stream, batch: TokenBatch) -> list[tuple[int, tuple[int, ...]]]:
    """Where the last predictor of every sequence stands, and the tokens up to it."""
    owners = batch.sequence_ids()[stream.token_index].tolist()
    last = dict(zip(owners, stream.predictor.tolist(), strict=True))
    return [(position, needed(batch)[owner]) for owner, position in last.items()]


@settings(max_examples=50, deadline=None)
@given(batch=batches())
def test_without_sharing_the_stream_is_the_sequences_side_by_side(batch: TokenBatch) -> None:
    stream = build_stream(batch, share_prefixes=False)
    present = [tokens for tokens in needed(batch) if tokens]
    assert stream.input_ids.tolist() == [token for tokens in present for token in tokens]
    assert stream.position_ids.tolist() == [i for tokens in present for i in range(len(tokens))]
    assert stream.tree.cu_seqlens_q.diff().tolist() == [len(tokens) for tokens in present]
    assert torch.equal(stream.tree.cu_seqlens_k, stream.tree.cu_seqlens_q)
    assert torch.equal(stream.tree.kv_index, torch.arange(len(stream.input_ids)))


def test_shared_tokens_are_counted_once() -> None:
    prompt = list(range(10))
    group = answers(prompt, [20, 21, 22], [30, 31, 32, 33, 34], [40])
    assert size(make_batch([group])) == 10 + 2 + 4 + 0  # the last token of an answer predicts nothing
    assert size(make_batch([group]), share_prefixes=False) == 12 + 14 + 10
    assert size(make_batch([group + group[:2]])) == 16  # duplicates cost nothing
    half = answers(prompt, [20, 21, 22, 23, 50], [20, 21, 22, 23, 60, 61])
    assert size(make_batch([group, half]), min_shared=2) == 16 + 2 + 1  # 20 21 stand already, 22 23 and 60 are new
    other = answers([*range(8), *range(70, 80)], [20, 21], [30, 31])
    long = answers(list(range(20)), [20, 21], [30, 31])
    assert size(make_batch([long, other])) == 8 + 12 + 2 + 10 + 2  # groups share the 8 tokens that prompts begin with


def test_a_prefix_is_shared_from_min_shared_tokens_on() -> None:
    batch = make_batch([answers(list(range(8)), [20, 21], [30, 31, 32])])
    assert size(batch, min_shared=8) == 8 + 1 + 2
    assert size(batch, min_shared=9) == 9 + 10


def test_a_token_after_the_last_predicting_one_is_never_computed() -> None:
    batch = make_batch([[([1, 2, 3, 4, 5, 6], [False, False, True, False, False, False])]])
    stream = build_stream(batch)
    assert (stream.input_ids.tolist(), stream.predictor.tolist(), stream.target.tolist()) == ([1, 2], [1], [3])


@pytest.mark.parametrize("share_prefixes", [False, True])
def test_a_sequence_without_loss_vanishes(share_prefixes: bool) -> None:
    silent: Sequences = [([7, 8, 9], [False] * 3), ([], [])]
    batch = make_batch([silent, answers([1, 2], [3, 4]), silent])
    stream = build_stream(batch, share_prefixes=share_prefixes)
    assert stream.input_ids.tolist() == [1, 2, 3]
    assert stream.token_index.tolist() == [5, 6]
    assert stream.tree.cu_seqlens_q.tolist() == [0, 3]
    (only,) = micro_batches(batch, max_tokens=100, share_prefixes=share_prefixes)
    assert only.token_ids.tolist() == [1, 2, 3, 4]
    with pytest.raises(DataError, match="no token of the micro-batch carries loss"):
        build_stream(make_batch([silent]), share_prefixes=share_prefixes)


def test_loss_on_a_first_token_is_refused() -> None:
    batch = make_batch([answers([1], [2]), answers([], [3, 4])])
    with pytest.raises(DataError, match="first token of a sequence cannot carry loss"):
        build_stream(batch)


def test_a_thousand_turns_that_each_continue_the_last_are_laid_out() -> None:
    tokens = list(range(1000))
    batch = make_batch([[(tokens[: n + 2], [False] * (n + 1) + [True]) for n in range(998)]])
    stream = build_stream(batch, min_shared=1)
    assert stream.input_ids.tolist() == tokens[:998]
    assert stream.predictor.tolist() == list(range(998))


@settings(max_examples=150, deadline=None)
@given(batch=batches(), max_tokens=st.integers(1, 40), share_prefixes=st.booleans(), min_shared=st.integers(1, 5))
def test_micro_batches_hold_every_sequence_once_within_the_budget_and_keep_groups_whole(
    batch: TokenBatch, max_tokens: int, share_prefixes: bool, min_shared: int
) -> None:
    numbered = batch.with_sequence_columns(number=torch.arange(batch.num_sequences))
    options = {"share_prefixes": share_prefixes, "min_shared": min_shared}
    parts = list(micro_batches(numbered, max_tokens=max_tokens, **options))
    numbers = [part.sequence_columns["number"].tolist() for part in parts]
    assert [number for found in numbers for number in found] == [i for i, tokens in enumerate(needed(batch)) if tokens]
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
    parts = list(micro_batches(batch, max_tokens=10))
    assert [part.num_tokens for part in parts] == [2, 51, 2]


@settings(max_examples=100, deadline=None)
@given(prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=8))
def test_prompts_are_laid_out_so_that_every_prompt_sees_itself(prompts: list[list[int]]) -> None:
    stream = prompt_stream([torch.tensor(prompt) for prompt in prompts])
    prefixes = {tuple(prompt[: n + 1]) for prompt in prompts for n in range(len(prompt))}
    assert len(stream.input_ids) == len(prefixes)  # with min_shared 1 every distinct prefix is one token of the stream
    for prompt, where in zip(prompts, stream.where, strict=True):
        assert stream.input_ids[where].tolist() == prompt
        assert torch.equal(visible(stream.tree, int(where[-1])), where)
        assert torch.equal(stream.position_ids[where], torch.arange(len(prompt)))
