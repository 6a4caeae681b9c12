"""A model that is more than plain attention trains on padded rows, and is then what it is on each sequence alone."""

import copy
import logging

import pytest
import torch

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.packing import build_stream
from nemo_rl.metrics import Sum, scalars
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.training.step import Scorer, score_tokens, train_step
from tiny_batches import plain_logprobs, plain_policy_loss, rollout_batch
from tiny_models import tiny_model

FAMILIES = ["mamba", "recurrent_gemma", "qwen3_next", "stablelm"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_is_that_of_the_plain_model(family: str) -> None:
    plain = tiny_model(family)
    batch = rollout_batch(plain)
    ours = CausalLM.wrap(copy.deepcopy(plain))
    expected = plain_logprobs(plain, batch)
    mask = batch.token_columns["loss_mask"]
    scores = score_tokens(Scorer(ours), batch, max_tokens=100)
    assert (scores - expected * mask).norm() <= 1e-5 * (expected * mask).norm()
    loss = plain_policy_loss(expected, batch)
    loss.backward()
    parts = train_step(
        Scorer(ours), batch, ClippedPolicyObjective(kl_weight=0.1), max_tokens=100, update=lambda: {"updates": Sum(1)}
    )
    metrics = scalars(parts)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    # prompts of 9, 15 and 20 tokens and answers of 2, 6 and 11, without their last token: nothing is shared
    assert metrics["tokens_computed"] == 3 * (9 + 15 + 20) + 2 * (1 + 5 + 10) + (1 + 1 + 10)
    for (name, parameter), reference in zip(ours.module.named_parameters(), plain.parameters(), strict=True):
        if reference.grad is None:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        difference, norm = (parameter.grad - reference.grad).norm(), reference.grad.norm()
        assert difference <= 1e-5 * norm, f"{name}: {difference / norm:.1e}"


def test_rows_are_exact_on_a_stream_that_shares_prefixes() -> None:
    plain = tiny_model("mamba")
    ours, batch = CausalLM.wrap(copy.deepcopy(plain)), rollout_batch(plain)
    stream = build_stream(batch, min_shared=3)
    assert len(stream.input_ids) < len(build_stream(batch, share_prefixes=False).input_ids)
    head = ours.token_head(temperature=1.0, chunk_size=16)
    got, _ = head(ours.stream_hidden(stream), ours.head.weight, stream.predictor, stream.target)
    torch.testing.assert_close(got, plain_logprobs(plain, batch)[stream.token_index], rtol=1e-5, atol=1e-5)


def test_a_trunk_that_answers_in_float32_feeds_a_bfloat16_head() -> None:
    plain = tiny_model("mamba", dtype=torch.bfloat16)
    batch = rollout_batch(plain)
    scores = score_tokens(Scorer(CausalLM.wrap(copy.deepcopy(plain))), batch, max_tokens=100)
    expected = plain_logprobs(plain, batch) * batch.token_columns["loss_mask"]
    assert (scores - expected).norm() <= 1e-2 * expected.norm()


def test_at_most_half_of_a_padded_batch_is_padding() -> None:
    ours = CausalLM.wrap(tiny_model("mamba"))
    lengths = torch.tensor([100] + [5] * 20)
    tokens = torch.randint(3, 128, (200,), generator=torch.Generator().manual_seed(0))
    last = torch.zeros(200, dtype=torch.bool).index_fill(0, lengths.cumsum(0) - 1, True)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    batch = TokenBatch(tokens, cu_seqlens, torch.arange(21), {"loss_mask": last})
    stream = build_stream(batch, share_prefixes=False)
    computed: list[int] = []
    ours.trunk.register_forward_pre_hook(
        lambda _module, _inputs, named: computed.append(named["input_ids"].numel()), with_kwargs=True
    )
    ours.stream_hidden(stream)
    assert sum(computed) <= 2 * len(stream.input_ids)
    assert len(computed) == 2  # and sequences of like length do run together


def test_the_fallback_is_said_once_and_only_where_it_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plain = tiny_model("mamba")
        ours = CausalLM.wrap(plain)
        batch = rollout_batch(tiny_model())
        for _ in range(2):
            score_tokens(Scorer(ours), batch, max_tokens=30)
        CausalLM.wrap(tiny_model("llama"))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("nemo_rl")]
    assert len(said) == 1 and said[0].startswith("MambaForCausalLM does not mix tokens by plain attention alone")
