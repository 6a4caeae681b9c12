"""A stream holds what the sequences hold, sees what the sequences saw, and holds nothing twice that it can share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.packing import SegmentTree, Stream, build_stream, prompt_stream
from nemo_rl.errors import DataError
from tiny_sequences import Sequences, answers, batches, make_batch, mask_of, needed, size


def visible(tree: SegmentTree, query: int) -> Tensor:
    """The keys that a query sees: causal, aligned bottom-right."""
    segment = int(torch.searchsorted(tree.cu_seqlens_q, query, right=True)) - 1
    keys = tree.kv_index[tree.cu_seqlens_k[segment] : tree.cu_seqlens_k[segment + 1]]
    queries_after = int(tree.cu_seqlens_q[segment + 1]) - 1 - query
    return keys[: len(keys) - queries_after]


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
