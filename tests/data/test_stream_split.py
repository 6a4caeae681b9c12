"""Context parallel ranks hold equally many tokens of a stream, compute equally many pairs and see what one would."""

import pytest
import torch
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.packing import SegmentTree, Stream, build_stream
from nemo_rl.data.stream_split import StreamSplit, split_stream


def stream_of(prompt: int, answers: list[int], *, share_prefixes: bool = True) -> Stream:
    """Answers of these lengths to one prompt, as one stream."""
    start = torch.arange(prompt)
    sequences = [torch.cat([start, torch.full((length,), 1000 + i)]) for i, length in enumerate(answers)]
    bounds = torch.tensor([0] + [len(sequence) for sequence in sequences]).cumsum(0)
    mask = torch.ones(int(bounds[-1]), dtype=torch.bool)
    mask[bounds[:-1]] = False
    batch = TokenBatch(torch.cat(sequences), bounds, torch.zeros(len(answers), dtype=torch.int64), {"loss_mask": mask})
    return build_stream(batch, share_prefixes=share_prefixes)


STREAMS = {
    "one long sequence": stream_of(1, [8000]),
    "packed sequences of every length": stream_of(1, [3000, 40, 900, 1, 10, 2000, 700, 90], share_prefixes=False),
    "many answers to one prompt": stream_of(1500, [300 + 37 * i for i in range(16)]),
    "short answers to a long prompt": stream_of(4000, [7, 20, 3, 50]),
}


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", STREAMS)
def test_tokens_are_equally_many_and_pairs_nearly(name: str, num_parts: int) -> None:
    stream = STREAMS[name]
    split = split_stream(stream, num_parts)
    size = -(-len(stream.input_ids) // num_parts)
    assert split.places.shape == (num_parts, size)
    assert split.places.flatten().sort().values.equal(torch.arange(num_parts * size))
    pairs = [split.part(rank).num_pairs for rank in range(num_parts)]
    assert max(pairs) <= 1.05 * sum(pairs) / num_parts


def test_a_part_can_be_divided_further() -> None:
    split = split_stream(STREAMS["short answers to a long prompt"], 3, multiple=4)
    assert split.places.shape == (3, 1360)  # of 4076 tokens


def test_two_ranks_share_a_causal_sequence_in_a_zigzag() -> None:
    split = split_stream(stream_of(1, [8000]), 2)
    outer, inner = (split.places[split.places[:, 0].argsort()]).unbind()
    assert outer.equal(torch.cat([torch.arange(2000), torch.arange(6000, 8000)]))
    assert inner.equal(torch.arange(2000, 6000))


def seen(tree: SegmentTree) -> list[list[int]]:
    """The keys of every query, in order."""
    found: list[list[int]] = []
    for r, num_q in enumerate(tree.cu_seqlens_q.diff().tolist()):
        keys = tree.kv_index[tree.cu_seqlens_k[r] : tree.cu_seqlens_k[r + 1]].tolist()
        found += [keys[: len(keys) - num_q + i + 1] for i in range(num_q)]
    return found


def whole_tree(split: StreamSplit) -> list[list[int]]:
    """The keys of every query of the stream, put together from what the parts say."""
    found: dict[int, list[int]] = {}
    holder: Tensor = split.places.flatten()
    for rank, places in enumerate(split.places.tolist()):
        keys = [holder[torch.tensor(row)].tolist() for row in seen(split.part(rank).tree)]
        found.update(zip(places, keys, strict=True))
    return [found[place] for place in range(len(found))]


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("answers", [[1], [9], [30, 4, 30, 1, 17]])
def test_every_token_sees_what_it_sees_in_one_stream(answers: list[int], num_parts: int) -> None:
    stream = stream_of(20, answers)
    split = split_stream(stream, num_parts)
    length = len(stream.input_ids)
    together = whole_tree(split)
    assert together[:length] == seen(stream.tree)
    assert together[length:] == [list(range(length, place + 1)) for place in range(length, len(together))]
    assert split.stream.input_ids[:length].equal(stream.input_ids)
    for rank, places in enumerate(split.places):
        part = split.part(rank)
        assert part.input_ids.equal(split.stream.input_ids[places])
        assert part.position_ids.equal(split.stream.position_ids[places])
        assert part.num_pairs == sum(len(keys) for keys in seen(part.tree))
