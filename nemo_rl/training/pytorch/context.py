"""Context parallelism: attention over a stream whose tokens lie on the ranks of a process group.

Each rank runs the trunk on its own tokens (`nemo_rl.data.stream_split.StreamPart`) and meets the others in attention
alone, with the values and gradients of one process. `GatheredContext` gathers the keys and values of all ranks and
serves any model; `UlyssesContext` exchanges tokens for heads, which moves less but needs heads that can be divided.
Behind the trunk, `gather_rows` shows the hidden states that predict to every rank, so that each computes the loss of
the whole micro-batch, whatever tokens that needs at once; `spread_rows` and `gather_scores` share the work of a head.

The loss is the sum of what the ranks call backward on, so each of c ranks divides it by c. Then every parameter's
gradient, the head's too, is the sum over the ranks.
"""

from dataclasses import dataclass, replace
from math import lcm

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemo_rl.data.stream_split import StreamSplit
from nemo_rl.distributed.collectives import all_gather, exchange
from nemo_rl.errors import ConfigError
from nemo_rl.models.attention import TreeAttention, Weighting
from nemo_rl.models.hidden import Score


class GatheredContext:
    """Runs a rank's queries against the keys and values of all ranks (an `AttentionPlan`).

    Forward one gathering per layer, backward one scattering of sums. As in the attention of Llama 3
    (https://arxiv.org/abs/2407.21783, section 3.3.2), keys and values are small where heads share them.
    """

    def __init__(self, split: StreamSplit, group: dist.ProcessGroup, device: torch.device | str = "cpu") -> None:
        self._tree = TreeAttention(split.part(group.rank()).tree, device)
        self._group = group

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, weighting: Weighting) -> Tensor:
        """See `AttentionPlan`; all tensors are of this rank's S/c tokens."""
        together = all_gather(torch.cat([k, v], -1), self._group)
        keys, values = together.split([k.shape[-1], v.shape[-1]], -1)
        return self._tree.attend(layer, q, keys, values, weighting)


class UlyssesContext:
    """Runs all queries of a rank's share of the heads (an `AttentionPlan`); forward and backward two exchanges each.

    Jacobs et al., "DeepSpeed Ulysses", 2023, https://arxiv.org/abs/2309.14509. Key heads that are too few to be divided
    are repeated.
    """

    def __init__(self, split: StreamSplit, group: dist.ProcessGroup, device: torch.device | str = "cpu") -> None:
        self._tree = TreeAttention(split.stream.tree, device)
        self._rank_order, self._places = split.rank_order.to(device), split.places.flatten().to(device)
        self._group = group

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, weighting: Weighting) -> Tensor:
        """See `AttentionPlan`; all tensors are of this rank's S/c tokens.

        Raises:
            ConfigError: the heads cannot be divided by the ranks.
        """
        rank, num_ranks = self._group.rank(), self._group.size()
        repeats = key_head_repeats(q.shape[1], k.shape[1], num_ranks)
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        # [c, S/c, heads/c * D] each: what every rank is sent of this rank's tokens
        shares = [x.unflatten(1, (num_ranks, -1)).transpose(0, 1).flatten(2) for x in (q, k, v)]
        received = exchange(torch.cat(shares, -1), self._group).flatten(0, 1).index_select(0, self._rank_order)
        own = received.split([share.shape[-1] for share in shares], -1)
        q, k, v = (x.unflatten(1, (-1, whole.shape[-1])) for x, whole in zip(own, (q, k, v), strict=True))
        if weighting.sinks is not None:
            weighting = replace(weighting, sinks=weighting.sinks.chunk(num_ranks)[rank])
        output = self._tree.attend(layer, q, k, v, weighting).index_select(0, self._places)
        return exchange(output.unflatten(0, (num_ranks, -1)), self._group).transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True, slots=True)
class SplitHidden:
    """The last hidden states of a stream whose tokens lie on several ranks (`nemo_rl.models.hidden.Hidden`).

    Attributes:
        states: [S/c, H], of this rank's tokens.
        split: where all tokens are.
        group: the c ranks, all of which ask for the same.
    """

    states: Tensor
    split: StreamSplit
    group: dist.ProcessGroup

    def rows(self, predictor: Tensor) -> Tensor:
        return gather_rows(self.states, self.split, predictor, self.group)

    def scores(self, predictor: Tensor, target: Tensor, score: Score) -> tuple[Tensor, Tensor]:
        """Every rank scores its share."""
        mine = spread_rows(self.rows(predictor), self.group)
        first, second = score(mine, spread_rows(target.to(mine.device), self.group))
        return gather_scores(first, len(target), self.group), gather_scores(second, len(target), self.group)


def key_head_repeats(num_heads: int, num_key_heads: int, num_ranks: int) -> int:
    """How often `UlyssesContext` repeats each key head so that the ranks can divide them.

    Raises:
        ConfigError: the heads cannot be divided.
    """
    divided = lcm(num_key_heads, num_ranks)
    if num_heads % divided:
        raise ConfigError(
            f"{num_heads} attention heads on {num_key_heads} key heads cannot be divided by {num_ranks} context "
            "parallel ranks; choose a divisor of the heads, or gather keys and values instead"
        )
    return divided // num_key_heads


def gather_rows(hidden: Tensor, split: StreamSplit, predictor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Select hidden states by stream position from all ranks, each once however often it is asked for.

    Args:
        hidden: [S/c, H], of this rank's tokens.
        split: where all tokens are.
        predictor: int64 [M], stream positions, as in `Stream`, the same on every rank.
        group: the c ranks.

    Returns:
        [M, H] on every rank, with gradient.
    """
    slots, inverse = split.rank_order[predictor.cpu()].unique(return_inverse=True)
    owner, own = slots // len(hidden), slots % len(hidden)
    counts = owner.bincount(minlength=group.size())
    width = int(counts.max())
    place = owner * width + torch.arange(len(slots)) - (counts.cumsum(0) - counts)[owner]
    mine = own[owner == group.rank()]
    filled = F.pad(mine, (0, width - len(mine))).to(hidden.device)  # the ranks send equally many, some of them unasked
    gathered = all_gather(hidden.index_select(0, filled), group)
    return gathered.index_select(0, place[inverse].to(hidden.device))


def spread_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's share [m, ...], by turns of M/c rows rounded up, of what every rank holds whole [M, ...]."""
    size = -(-len(rows) // group.size())
    return rows[group.rank() * size :][:size]


def gather_scores(scores: Tensor, num_rows: int, group: dist.ProcessGroup) -> Tensor:
    """Put what the ranks computed from their `spread_rows` [m] together: [M] on every rank, with gradient."""
    size = -(-num_rows // group.size())
    return all_gather(F.pad(scores, (0, size - len(scores))), group)[:num_rows]
