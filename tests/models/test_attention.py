"""Packed, prefix-shared and plain sequences must be one and the same to a model: values and every gradient."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.packing import SegmentTree, build_stream
from nemo_rl.errors import ModelError
from nemo_rl.models.attention import TreeAttention, Weighting
from nemo_rl.models.causal_lm import CausalLM
from tiny_models import embedded_folder, tiny_model
from tiny_streams import assert_same, both, group_batch, plain_logprobs, stream_logprobs


@pytest.mark.parametrize("window", [3, 8, 40])
def test_a_sliding_window_cuts_a_branch_off_from_far_ancestors(window: int) -> None:
    plain, ours = both(tiny_model("mistral", sliding_window=window))
    batch = group_batch(128)
    assert_same(plain, ours, batch, build_stream(batch, share_prefixes=True, min_shared=1))


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_soft_caps_and_sinks_hold_where_a_fused_kernel_would_run(family: str) -> None:
    plain, ours = both(tiny_model(family, sliding_window=300))
    tokens = torch.randint(3, 128, (230,), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(tokens, torch.tensor([0, 230]), torch.tensor([0]), {"loss_mask": torch.arange(230) > 0})
    assert_same(plain, ours, batch, build_stream(batch))


def test_shared_prefixes_are_exact_on_a_pretrained_model() -> None:
    plain = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32).eval()
    plain, ours = both(plain)
    batch = group_batch(2000).select(range(8))
    assert_same(plain, ours, batch, build_stream(batch))


def test_a_leak_between_packed_sequences_is_caught() -> None:
    plain, ours = both(tiny_model("llama"))
    batch = group_batch(128)
    stream = build_stream(batch, share_prefixes=False)
    whole = torch.tensor([0, len(stream.input_ids)])
    leaking = SegmentTree(whole, whole, torch.arange(len(stream.input_ids)))  # one causal segment over everything
    got = stream_logprobs(ours, stream, TreeAttention(leaking))
    expected = plain_logprobs(plain, batch)
    assert (got - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("changes", [{}, {"softcap": 1.5}, {"sinks": torch.tensor([2.0, 0.5, -1.0, 0.0, 1.0, 3.0])}])
def test_bfloat16_attention_on_a_cpu_is_as_close_as_its_precision_allows(changes: dict[str, Any]) -> None:
    stream = build_stream(group_batch(128), min_shared=4)
    q, k, v = (torch.randn(len(stream.input_ids), heads, 16) for heads in (6, 2, 2))
    plan, weighting = TreeAttention(stream.tree), Weighting(scale=0.25, **changes)
    exact = plan.attend(0, q, k, v, weighting)
    low = plan.attend(0, q.bfloat16(), k.bfloat16(), v.bfloat16(), weighting)
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).norm() <= 1e-2 * exact.norm()


def test_a_model_that_makes_its_own_attention_mask_is_refused() -> None:
    ours = CausalLM.wrap(tiny_model("doge"))
    stream = build_stream(group_batch(128))
    with pytest.raises(ModelError, match="attention mask of its own"):
        ours.stream_hidden(stream)


def test_a_model_with_a_head_of_its_own_is_refused() -> None:
    with pytest.raises(ModelError, match="in a way of its own"):
        CausalLM.wrap(tiny_model("bert", is_decoder=True))


def test_a_wrapped_model_does_not_run_without_a_plan() -> None:
    ours = CausalLM.wrap(tiny_model("llama"))
    with pytest.raises(ModelError, match="attention plan"):
        ours.module(torch.tensor([[3, 4, 5]]))
