"""What sequences cost a model: tokens computed, shared prefixes once, and the pairs that attention compares."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from nemo_rl.config.model_shapes import ModelShape
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.packing import inputs_and_targets
from nemo_rl.data.prefix_tree import PrefixTree


@dataclass(frozen=True, slots=True)
class ComputeCost:
    """Cost that grows with the tokens and, through attention, with the pairs of a query and a key that it sees.

    Attributes:
        per_token: of a computed token.
        per_pair: of an attended pair, all layers together; 0 counts tokens alone.
    """

    per_token: int = 1
    per_pair: int = 0

    @classmethod
    def of_model(cls, shape: ModelShape) -> Self:
        """Floating-point operations of a forward pass; a backward pass costs twice that.

        A token costs 2 for each weight of the layers; a pair costs 2 for each element of all query heads in the product
        with the key, and 2 in that with the value. The LM head is left out: it reads loss tokens only.
        """
        embeddings = (1 if shape.tied else 2) * shape.vocab * shape.hidden
        return cls(
            per_token=2 * (shape.parameters - embeddings), per_pair=4 * shape.layers * shape.heads * shape.head_dim
        )

    def of(self, tree: PrefixTree) -> int:
        """The cost of one stream."""
        return self.per_token * tree.num_tokens + self.per_pair * tree.num_pairs


def costs(
    batch: TokenBatch,
    parts: Sequence[Sequence[int]],
    cost: ComputeCost,
    *,
    share_prefixes: bool = True,
    min_shared: int = 8,
) -> list[int]:
    """The cost of each part, sequences of a batch with a `loss_mask`, as a stream of its own; 0 without loss."""
    inputs, _ = inputs_and_targets(batch)
    groups = batch.group_ids.tolist()
    return [
        cost.of(
            PrefixTree.of(
                [inputs[i] for i in part],
                [groups[i] for i in part],
                share_prefixes=share_prefixes,
                min_shared=min_shared,
            )
        )
        for part in parts
    ]


def useful_tokens(batch: TokenBatch, *, min_shared: int = 8) -> int:
    """Tokens that must enter a model to train on a batch, were it one stream: what sequences share counts once."""
    (tokens,) = costs(batch, [range(batch.num_sequences)], ComputeCost(), min_shared=min_shared)
    return tokens
