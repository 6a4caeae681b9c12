"""A head whose rows lie on several ranks gives the numbers and the gradients of the whole head on one."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_rl.distributed.vocabulary import ShardedVocabulary
from nemo_rl.objectives.distillation import distillation_loss
from nemo_rl.objectives.logprobs import LogitHead, TokenHead
from nemo_rl.objectives.truncation import Truncation
from nemo_rl.objectives.vocabulary import UNDIVIDED, Vocabulary
from ranks import run_ranks

NUM_TOKENS, HIDDEN = 37, 16

HEADS: dict[str, TokenHead] = {
    "chunked": TokenHead(temperature=0.7, chunk_size=256),
    "chunked in small pieces, scaled": TokenHead(temperature=0.7, chunk_size=9, logit_scale=0.5),
    "without entropy": TokenHead(chunk_size=9, with_entropy=False),
    "soft cap": TokenHead(temperature=0.7, chunk_size=10, softcap=3.0),
    "top-k": TokenHead(chunk_size=10, truncation=Truncation(top_k=5)),
    "top-p": TokenHead(chunk_size=256, truncation=Truncation(top_p=0.6)),
    "all of it": TokenHead(temperature=1.3, chunk_size=10, softcap=5.0, truncation=Truncation(0.9, 20, 0.02)),
}


def make(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, HIDDEN, generator=generator, dtype=dtype)
    weight = torch.randn(vocab, HIDDEN, generator=generator, dtype=dtype)
    bias = torch.randn(vocab, generator=generator, dtype=dtype)
    target = torch.randint(vocab, (NUM_TOKENS,), generator=generator)
    weight[-1] *= 5  # some row of the last chunk is far above all of the others
    return hidden, weight, bias, target


type Score = Callable[[Tensor, Tensor, Tensor, Tensor, Vocabulary], tuple[Tensor, ...]]


def token_scores(
    head: TokenHead, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, ...]:
    head = replace(head, vocabulary=vocabulary)
    return head(hidden, weight, torch.arange(NUM_TOKENS).flip(0), target, bias=bias)


def divergence(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, ...]:
    del target
    logits = LogitHead(weight, bias, 0.5, 4.0, vocabulary)(hidden)
    teacher = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    return distillation_loss(logits, teacher, forward_weight=0.3), logits.detach()


SCORES: dict[str, Score] = {name: partial(token_scores, head) for name, head in HEADS.items()}
SCORES["distillation"] = divergence


def run(vocab: int, dtype: torch.dtype, vocabulary: Vocabulary, rows: slice) -> dict[str, Any]:
    """Every score, its gradients, and the likeliest tokens, with these rows of the head."""
    found: dict[str, Any] = {}
    for name, score in SCORES.items():
        hidden, weight, bias, target = make(vocab, dtype)
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight[rows], bias[rows])]
        values, extra = score(*inputs, target, vocabulary)
        gradients = torch.autograd.grad((values * torch.linspace(-1, 1, NUM_TOKENS)).sum(), inputs)
        found[name] = (values.detach(), extra, *gradients)
    hidden, weight, bias, _ = make(vocab, dtype)
    head = LogitHead(weight[rows], bias[rows], vocabulary=vocabulary)
    for k, size in ((1, None), (9, None), (7, vocab - 3)):
        found[f"top {k} of {size}"] = head.topk(hidden, k, temperature=0.8, vocab_size=size)
    return found


def sharded(rank: int, vocab: int, dtype: torch.dtype) -> tuple[dict[str, Any], int]:
    assert dist.group.WORLD is not None
    vocabulary = ShardedVocabulary(dist.group.WORLD, vocab)
    rows = slice(vocabulary.start, vocabulary.start + vocabulary.size)
    chunks = dict(enumerate(torch.arange(vocab).chunk(dist.get_world_size())))
    assert torch.arange(vocab)[rows].equal(chunks.get(rank, torch.arange(0)))
    return run(vocab, dtype, vocabulary, rows), vocabulary.size


def assert_close(got: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    assert got.dtype == expected.dtype, name
    assert got.isnan().equal(expected.isnan()), name
    difference, norm = (got - expected).nan_to_num().norm(), expected.nan_to_num().norm()
    assert difference <= tolerance * norm, f"{name}: {difference / norm:.1e}"


# of 101 tokens three ranks get 34, 34 and 33; of 16 five ranks get 4, 4, 4, 4 and none
@pytest.mark.parametrize(
    ("num_ranks", "vocab", "dtype", "tolerance"),
    [
        (1, 101, torch.float64, 1e-12),
        (2, 101, torch.float32, 3e-6),
        (3, 101, torch.float64, 1e-12),
        (5, 16, torch.float64, 1e-12),
    ],
)
def test_a_head_over_several_ranks_is_the_whole_head(
    num_ranks: int, vocab: int, dtype: torch.dtype, tolerance: float
) -> None:
    expected = run(vocab, dtype, UNDIVIDED, slice(None))
    results = run_ranks(sharded, num_ranks, vocab, dtype)
    assert sum(size for _, size in results) == vocab
    assert num_ranks == 1 or all(size < vocab for _, size in results)
    for name, whole in expected.items():
        parts = [found[name] for found, _ in results]
        if name.startswith("top "):
            for values, ids in parts:
                assert_close(values, whole[0], tolerance, name)
                assert ids.equal(whole[1]), name
            continue
        for part in parts:  # all ranks know the scores and the gradient of the hidden states
            for got, wanted in zip(part[:3], whole[:3], strict=True):
                assert_close(got, wanted, tolerance, name)
        for place in (3, 4):  # and their own rows of the head's
            assert_close(torch.cat([part[place] for part in parts]), whole[place], tolerance, name)
