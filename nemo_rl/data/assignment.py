"""Which sequences of a batch each data-parallel rank computes, and how their answers come together again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.bins import balance
from nemo_rl.data.cost import ComputeCost, costs
from nemo_rl.errors import DataError


def assign(
    batch: TokenBatch,
    num_ranks: int,
    cost: ComputeCost,
    *,
    whole_groups: bool,
    share_prefixes: bool = True,
    min_shared: int = 8,
) -> list[Tensor]:
    """Choose the sequences of each rank so that all ranks compute about equally long.

    A group stays on one rank, where its common prefix is computed once. Unless `whole_groups`, a group that is more
    than a rank's fair share is dealt sequence by sequence; with fewer groups than ranks, so are all.

    Args:
        batch: with a `loss_mask` column; sequences without loss cost nothing.
        num_ranks: how many ranks there are.
        cost: of a sequence or group.
        whole_groups: never divide a group, as a loss that compares its sequences needs it.
        share_prefixes: whether the model computes a shared prefix once.
        min_shared: shortest prefix worth sharing, in tokens.

    Returns:
        For each rank int64 [n] sequence indices, increasing, so that groups stay neighbours; together they are all
        sequences, each once. A rank gets none only if there are fewer groups than ranks, and none with loss only if
        there are fewer groups with loss (sequences, unless `whole_groups`).

    Raises:
        DataError: `num_ranks` is not positive.
    """
    if num_ranks < 1:
        raise DataError(f"a batch was to be dealt to {num_ranks} ranks; it takes at least 1")

    def loads_of(units: Sequence[Sequence[int]]) -> list[int]:
        return costs(batch, units, cost, share_prefixes=share_prefixes, min_shared=min_shared)

    sizes = batch.group_ids.unique_consecutive(return_counts=True)[1].tolist()
    units = [indices.tolist() for indices in torch.arange(batch.num_sequences).split(sizes)] if sizes else []
    loads = loads_of(units)
    if not whole_groups:
        share = sum(loads) / num_ranks if sum(load > 0 for load in loads) >= num_ranks else -1
        whole = [[unit] if load <= share else [[i] for i in unit] for unit, load in zip(units, loads, strict=True)]
        units = [part for parts in whole for part in parts]
        loads = loads_of(units)
    return [_sequences([units[i] for i in part]) for part in balance(loads, num_ranks)]


def join(batch: TokenBatch, parts: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Put what ranks computed for every token of their sequences back into the order of the whole batch.

    Args:
        batch: the whole batch, of N tokens.
        parts: [N_r, ...] of each rank; one without loss may not know how wide its rows are, which are 0 then.
        indices: what `assign` gave.

    Returns:
        [N, ...].
    """
    like = max(parts, key=Tensor.numel)
    joined = like.new_zeros(batch.num_tokens, *like.shape[1:])
    for part, chosen in zip(parts, indices, strict=True):
        if part.shape[1:] == like.shape[1:]:
            joined[batch.token_index(chosen)] = part
    return joined


def _sequences(units: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(sorted(index for unit in units for index in unit), dtype=torch.int64)
