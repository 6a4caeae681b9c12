"""Packed, prefix-shared and plain sequences must be one and the same to a model: values and every gradient."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.packing import SegmentTree, Stream, build_stream
from nemo_rl.errors import ModelError
from nemo_rl.models.attention import TreeAttention, Weighting
from nemo_rl.models.causal_lm import CausalLM
from tiny_models import FAMILIES, embedded_folder, tiny_model


def group_batch(vocabulary: int, *, seed: int = 0) -> TokenBatch:
    """Three groups of four answers; within the first an answer stands twice and two answers begin alike."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> Tensor:
        return torch.randint(3, vocabulary, (length,), generator=generator)

    system = draw(9)  # all prompts begin alike
    sequences, masks, groups = [], [], []
    for group, prompt_length in enumerate((5, 14, 21)):
        prompt = torch.cat([system, draw(prompt_length)])
        answers = [draw(length) for length in (3, 7, 12, 17)]
        if group == 0:
            answers[1] = answers[0]
            answers[3] = torch.cat([answers[2][:10], answers[3]])
        for answer in answers:
            sequences.append(torch.cat([prompt, answer]))
            masks.append(torch.cat([torch.zeros(len(prompt)), torch.ones(len(answer))]).bool())
            groups.append(group)
    lengths = torch.tensor([0] + [len(sequence) for sequence in sequences])
    return TokenBatch(torch.cat(sequences), lengths.cumsum(0), torch.tensor(groups), {"loss_mask": torch.cat(masks)})


def plain_logprobs(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Every sequence alone through plain Transformers: [M] in the order of the loss tokens."""
    found = []
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        tokens, mask = batch.token_ids[start:end], batch.token_columns["loss_mask"][start:end]
        logprobs = model(tokens[None]).logits[0].float().log_softmax(-1)
        found.append(logprobs[:-1].gather(-1, tokens[1:, None])[:, 0][mask[1:]])
    return torch.cat(found)


def stream_logprobs(model: CausalLM, stream: Stream, plan: TreeAttention) -> Tensor:
    head = model.token_head(temperature=1.0, chunk_size=16)
    hidden = model.hidden(stream.input_ids, stream.position_ids, plan)
    return head(hidden, model.head.weight, stream.predictor, stream.target, bias=model.head.bias)[0]


def both(model: PreTrainedModel) -> tuple[PreTrainedModel, CausalLM]:
    """The model as Transformers runs it by its plainest formula, and an equal one as we run it."""
    ours = CausalLM.wrap(copy.deepcopy(model))
    model.set_attn_implementation("eager")  # Transformers' sdpa knows neither soft caps nor sinks
    return model, ours


def assert_same(plain: PreTrainedModel, ours: CausalLM, batch: TokenBatch, stream: Stream) -> None:
    weights = torch.randn(len(stream.target), generator=torch.Generator().manual_seed(1))
    expected = plain_logprobs(plain, batch)
    got = stream_logprobs(ours, stream, TreeAttention(stream.tree))
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    plain.zero_grad()
    ours.module.zero_grad()
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    differences, norms = [], []
    for (name, ours_parameter), parameter in zip(ours.module.named_parameters(), plain.parameters(), strict=True):
        assert ours_parameter.grad is not None and parameter.grad is not None, name
        difference, norm = (ours_parameter.grad - parameter.grad).norm(), parameter.grad.norm()
        assert difference <= 3e-5 * norm, f"{name}: {difference / norm:.1e}"
        differences.append(difference)
        norms.append(norm)
    assert torch.stack(differences).norm() <= 1e-5 * torch.stack(norms).norm()


@pytest.mark.parametrize("share_prefixes", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_shared_equal_plain_transformers(family: str, share_prefixes: bool) -> None:
    plain, ours = both(tiny_model(family))
    batch = group_batch(128)
    assert_same(plain, ours, batch, build_stream(batch, share_prefixes=share_prefixes, min_shared=4))


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
