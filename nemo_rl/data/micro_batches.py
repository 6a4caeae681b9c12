"""Micro-batches: how a batch is cut into parts that fit into memory."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from nemo_rl.config.schema.policy import PackingAlgorithm
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.bins import PACKERS
from nemo_rl.data.packing import inputs_and_targets
from nemo_rl.data.prefix_tree import PrefixTree


def cut(
    batch: TokenBatch,
    *,
    max_tokens: int,
    algorithm: PackingAlgorithm = "first_fit_decreasing",
    share_prefixes: bool = True,
    min_shared: int = 8,
) -> list[Tensor]:
    """Choose the sequences of each micro-batch, so that its stream holds at most `max_tokens` tokens.

    Groups stay whole while they fit, so that what they share is computed once; a group beyond the budget is cut between
    its sequences, and one sequence beyond it goes alone. Sequences without a loss token are left out: they compute
    nothing.

    Args:
        batch: with a `loss_mask` column.
        max_tokens: budget of a micro-batch in computed tokens.
        algorithm: fills the micro-batches with the groups, or what they were cut into.
        share_prefixes: whether the model computes a shared prefix once.
        min_shared: shortest prefix worth sharing, in tokens.

    Returns:
        int64 [n] sequence indices of each micro-batch, increasing.
    """
    inputs, _ = inputs_and_targets(batch)
    groups = batch.group_ids.tolist()
    pieces = _pieces(batch, max_tokens, share_prefixes=share_prefixes, min_shared=min_shared)
    parts: list[list[int]] = []
    for chosen in PACKERS[algorithm]([tokens for _, tokens in pieces], max_tokens):
        held = [pieces[i][0] for i in chosen]
        merged = sorted(chain.from_iterable(held))
        # what one piece of a group shares may be too little to be shared once another piece forks from it
        if len({groups[piece[0]] for piece in held}) < len(held):
            tree = PrefixTree.of([inputs[i] for i in merged], share_prefixes=share_prefixes, min_shared=min_shared)
            parts += [merged] if tree.num_tokens <= max_tokens else held
        else:
            parts.append(merged)
    return [torch.tensor(part) for part in parts]


def micro_batches(
    batch: TokenBatch,
    *,
    max_tokens: int,
    algorithm: PackingAlgorithm = "first_fit_decreasing",
    share_prefixes: bool = True,
    min_shared: int = 8,
) -> Iterator[TokenBatch]:
    """The parts of a batch that `cut` chooses, one in memory at a time."""
    parts = cut(batch, max_tokens=max_tokens, algorithm=algorithm, share_prefixes=share_prefixes, min_shared=min_shared)
    return map(batch.select, parts)


def padding_micro_batch(
    batch: TokenBatch, *, max_tokens: int, share_prefixes: bool = True, min_shared: int = 8
) -> TokenBatch:
    """The cheapest micro-batch that a rank can run only because other ranks still run theirs.

    It is a copy of the smallest group (or piece of one beyond the budget) with `loss_weights` of 0, so it adds nothing
    to a loss or a gradient. In a batch where nothing carries loss, the last token of every sequence stands in; for one
    in which nothing can be predicted, such as that of a rank without a sequence, a pair of two tokens each does.
    """
    if not batch.token_columns["loss_mask"].any():
        last = batch.cu_seqlens[1:][batch.lengths > 1] - 1
        if not len(last):
            return _stand_in(batch)
        batch = batch.with_columns(loss_mask=torch.zeros(batch.num_tokens, dtype=torch.bool).index_fill(0, last, True))
    pieces = _pieces(batch, max_tokens, share_prefixes=share_prefixes, min_shared=min_shared)
    part = batch.select(min(pieces, key=lambda piece: piece[1])[0])
    return part.with_columns(loss_weights=torch.zeros(part.num_tokens))


def _stand_in(batch: TokenBatch) -> TokenBatch:
    """Two sequences with the columns of a batch: zeros, but for what tells the members of a pair apart."""
    loss_mask = torch.tensor([False, True, False, True])
    columns = {name: column.new_zeros(4, *column.shape[1:]) for name, column in batch.token_columns.items()}
    return TokenBatch(
        torch.zeros(4, dtype=torch.int64),
        torch.tensor([0, 2, 4]),
        torch.zeros(2, dtype=torch.int64),
        {**columns, "loss_mask": loss_mask, "loss_weights": torch.zeros(4)},
        {
            name: torch.tensor([True, False]) if column.dtype == torch.bool else column.new_zeros(2)
            for name, column in batch.sequence_columns.items()
        },
    )


def _pieces(
    batch: TokenBatch, max_tokens: int, *, share_prefixes: bool, min_shared: int
) -> list[tuple[list[int], int]]:
    """What is never divided, and the tokens that it computes: groups, or parts of those beyond the budget."""
    inputs, wanted = inputs_and_targets(batch)
    groups: dict[int, list[int]] = {}
    for index, group_id in enumerate(batch.group_ids.tolist()):
        if len(wanted[index]):
            groups.setdefault(group_id, []).append(index)

    def tokens(indices: Sequence[int]) -> int:
        members = [inputs[i] for i in indices]
        return PrefixTree.of(members, share_prefixes=share_prefixes, min_shared=min_shared).num_tokens

    pieces: list[tuple[list[int], int]] = []
    for rest in groups.values():
        while rest:
            fitting = rest[: _num_fitting(rest, max_tokens, tokens)]
            pieces.append((fitting, tokens(fitting)))
            rest = rest[len(fitting) :]
    return pieces


def _num_fitting(indices: Sequence[int], max_tokens: int, tokens: Callable[[Sequence[int]], int]) -> int:
    """How many of the first sequences fit into the budget together, at least one; more sequences never cost less."""
    sizes = range(1, len(indices) + 1)
    return max(1, bisect_right(sizes, max_tokens, key=lambda size: tokens(indices[:size])))
