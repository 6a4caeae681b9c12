"""A stream over several context parallel ranks: values and every gradient are those of one process."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.packing import Stream, build_stream
from nemo_rl.data.stream_split import StreamSplit, split_stream
from nemo_rl.errors import ConfigError
from nemo_rl.models.attention import AttentionPlan, TreeAttention, Weighting
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.training.pytorch.context import (
    GatheredContext,
    UlyssesContext,
    gather_rows,
    gather_scores,
    key_head_repeats,
    spread_rows,
)
from ranks import run_ranks
from tiny_batches import rollout_batch
from tiny_models import tiny_model

PLANS = {"gathered": GatheredContext, "ulysses": UlyssesContext}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gpt_oss": {},
    "gemma2": {},
}


@cache
def batch() -> TokenBatch:
    return rollout_batch(tiny_model()).select([0, 1, 3, 4, 5, 6, 7, 8])


def streams() -> dict[str, Stream]:
    return {
        "packed": build_stream(batch(), share_prefixes=False),
        "shared": build_stream(batch(), share_prefixes=True, min_shared=4),
    }


def loss_of(logprobs: Tensor) -> Tensor:
    """What needs all tokens at once, so that no rank could know its own part of it."""
    return (logprobs * torch.linspace(-1, 1, len(logprobs))).sum() + (logprobs.mean() + 4).square().exp()


def one_process(family: str, stream: Stream) -> tuple[Tensor, tuple[Tensor, ...]]:
    model = CausalLM.wrap(tiny_model(family, **MODELS[family]))
    head = model.token_head(temperature=0.8, chunk_size=16)
    logprobs, _ = head(model.stream_hidden(stream), model.head.weight, stream.predictor, stream.target)
    return logprobs.detach(), torch.autograd.grad(loss_of(logprobs), list(model.module.parameters()))


def several(rank: int, given: dict[str, Stream]) -> dict[tuple[str, str, str, str], Any]:
    """Every model, stream and plan, and two ways to score: the whole head on every rank, or a part of its rows."""
    group = dist.group.WORLD
    assert group is not None
    found: dict[tuple[str, str, str, str], Any] = {}
    for family in MODELS:
        model = CausalLM.wrap(tiny_model(family, **MODELS[family]))
        head = model.token_head(temperature=0.8, chunk_size=16)
        for name, stream in given.items():
            split = split_stream(stream, group.size())
            part = split.part(rank)
            for kind, plan in PLANS.items():
                for spread in ("spread", "whole") if family == "llama" else ("spread",):
                    hidden = model.hidden(part.input_ids, part.position_ids, plan(split, group))
                    assert len(hidden) == -(-len(stream.input_ids) // group.size())
                    rows, target = gather_rows(hidden, split, stream.predictor, group), stream.target
                    if spread == "spread":
                        rows, target = spread_rows(rows, group), spread_rows(target, group)
                    logprobs, _ = head(rows, model.head.weight, torch.arange(len(rows)), target)
                    if spread == "spread":
                        logprobs = gather_scores(logprobs, len(stream.target), group)
                    loss = loss_of(logprobs) / group.size()
                    gradients = torch.autograd.grad(loss, list(model.module.parameters()))
                    found[family, name, kind, spread] = logprobs.detach(), gradients
    return found


@pytest.mark.parametrize("num_ranks", [2, 4])  # of 2 key heads four ranks need each twice
def test_a_stream_over_several_ranks_gives_the_numbers_of_one(num_ranks: int) -> None:
    given = streams()
    assert len(given["packed"].input_ids) % num_ranks  # there is something to fill up
    results = run_ranks(several, num_ranks, given, timeout=240)
    for family in MODELS:
        names = [name for name, _ in tiny_model(family, **MODELS[family]).named_parameters()]
        for name, stream in given.items():
            expected, expected_gradients = one_process(family, stream)
            for case in (key for key in results[0] if key[:2] == (family, name)):
                for found in results:
                    assert (found[case][0] - expected).norm() <= 1e-5 * expected.norm(), case
                summed = [torch.stack(parts).sum(0) for parts in zip(*(f[case][1] for f in results), strict=True)]
                for parameter, got, wanted in zip(names, summed, expected_gradients, strict=True):
                    difference, norm = (got - wanted).norm(), wanted.norm()
                    assert difference <= 3e-5 * norm, f"{case}, {parameter}: {difference / norm:.1e}"


WEIGHTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 5},
    "soft cap": {"softcap": 1.5},
    "sinks in a window": {"window": 9, "sinks": True},
}


def attended(plan: AttentionPlan, places: Tensor, weighting: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Attend with 6 heads on 2 key heads, values narrower than keys, at these stream positions; and the gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1000, heads, size, generator=generator, dtype=torch.float64)[places].requires_grad_()
        for heads, size in ((6, 8), (2, 8), (2, 4))
    )
    sinks = torch.linspace(-1, 2, 6, dtype=torch.float64).requires_grad_()
    chosen = sinks if weighting.get("sinks") else None
    output = plan.attend(0, q, k, v, Weighting(0.4, **{**weighting, "sinks": chosen}))
    weights = torch.randn(1000, 6, 4, generator=generator, dtype=torch.float64)[places]
    inputs = [q, k, v] if chosen is None else [q, k, v, sinks]
    return output.detach(), list(torch.autograd.grad((output * weights).sum(), inputs))


def attended_by_ranks(rank: int, split: StreamSplit) -> dict[tuple[str, str], Any]:
    group = dist.group.WORLD
    assert group is not None
    return {
        (kind, name): attended(plan(split, group), split.places[rank], weighting)
        for kind, plan in PLANS.items()
        for name, weighting in WEIGHTINGS.items()
    }


def test_three_ranks_attend_as_one_in_double_precision() -> None:
    split = split_stream(streams()["shared"], 3)
    results = run_ranks(attended_by_ranks, 3, split)
    whole = TreeAttention(split.stream.tree)
    for kind, name in results[0]:
        output, (*expected, sinks) = attended(whole, torch.arange(split.places.numel()), WEIGHTINGS[name])
        parts = [found[kind, name] for found in results]
        if "sinks" in WEIGHTINGS[name]:
            summed = torch.stack([part[1][3] for part in parts]).sum(0)
            torch.testing.assert_close(summed, sinks, rtol=1e-10, atol=1e-10)
        else:
            expected.append(sinks)
        joined = [torch.cat(rows)[split.rank_order] for rows in zip(*((p[0], *p[1][:3]) for p in parts), strict=True)]
        torch.testing.assert_close(joined, [output, *expected], rtol=1e-10, atol=1e-10, msg=f"{kind}, {name}")


def test_heads_that_cannot_be_divided_are_refused() -> None:
    assert key_head_repeats(32, 8, 4) == 1
    assert key_head_repeats(32, 8, 16) == 2
    assert key_head_repeats(6, 2, 3) == 3
    with pytest.raises(ConfigError, match="4 attention heads on 2 key heads cannot be divided by 3 context parallel"):
        key_head_repeats(4, 2, 3)
