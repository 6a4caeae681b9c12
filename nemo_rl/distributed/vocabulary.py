"""A vocabulary in chunks over the ranks of a process group (`nemo_rl.objectives.vocabulary.Vocabulary`)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemo_rl.distributed.collectives import all_gather


@dataclass(frozen=True, slots=True)
class ShardedVocabulary:
    """Rank r of the group holds the r-th chunk of the head's rows, as `torch.chunk` and DTensor's `Shard(0)` cut them.

    All chunks are `width` tokens long, but for the last ones, which may be shorter or empty.

    Attributes:
        group: the ranks.
        total: V, the tokens of all ranks.
    """

    group: dist.ProcessGroup
    total: int

    @property
    def width(self) -> int:
        """Tokens of a full chunk."""
        return -(-self.total // self.group.size())

    @property
    def start(self) -> int:
        """The first token of this rank."""
        return min(self.group.rank() * self.width, self.total)

    @property
    def size(self) -> int:
        """The number of tokens of this rank, v."""
        return min(self.width, self.total - self.start)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor of one shape over the ranks."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """The highest value of each element over the ranks."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def gather(self, columns: Tensor) -> Tensor:
        """Put [m, w] of all t ranks side by side: [m, t*w]."""
        ranks = all_gather(columns[None], self.group)
        return ranks.transpose(0, 1).flatten(1)

    def join(self, columns: Tensor) -> Tensor:
        """Put the columns [m, v] of all ranks' tokens together, short chunks filled up on the way: [m, V]."""
        return self.gather(F.pad(columns, (0, self.width - self.size)))[:, : self.total]

    def _reduced(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        result = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, operation, self.group)
        return result
