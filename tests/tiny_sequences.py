"""Small jagged batches with a loss mask, and the plainest way to say what of them a model needs."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.packing import build_stream

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
