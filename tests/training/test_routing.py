"""Routers: float32 whatever the weights are, counted as they choose, balanced the same however a batch is cut."""

import copy

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import ConfigError
from nemo_rl.metrics import Max, Mean, Metrics, merge
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.training.pytorch.experts import shard_experts
from nemo_rl.training.pytorch.routing import (
    Balance,
    Routing,
    expert_counts,
    router_modules,
    routing_metrics,
    update_biases,
    use_float32_routers,
    watched_routers,
)
from nemo_rl.training.step import Scorer, train_step
from tiny_batches import plain_logprobs, plain_policy_loss, rollout_batch
from tiny_experts import MIXTURES, assert_close, gradients
from tiny_models import tiny_model

TOKENS = torch.randint(3, 128, (2, 15), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_float32_routers_see_the_whole_inputs_and_keep_their_weights(family: str, autocast: bool) -> None:
    model = tiny_model(family, dtype=torch.float32 if autocast else torch.bfloat16)
    before = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    shard_experts(model)
    use_float32_routers(model)
    assert before == {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    routers = list(router_modules(model).values())
    inputs: list[Tensor] = []
    for router in routers:
        router.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    routings: list[Routing] = []
    note = lambda _, routing: routings.append(routing)  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), watched_routers(model, note):
        output = model(TOKENS, use_cache=False).logits
    for router, states, routing in zip(routers, inputs, routings, strict=True):
        bias = getattr(router, "bias", None)
        rows = states.reshape(-1, states.shape[-1])
        exact = rows.float() @ router.weight.float().T + (0 if bias is None else bias.float())
        assert routing.logits.dtype == torch.float32
        assert_close(routing.logits.detach(), exact.detach(), "logits", 1e-6)
    output.float().square().sum().backward()
    assert all(found.isfinite().all() for found in gradients(model).values())
    assert all(router.weight.grad.norm() > 0 for router in routers)


@pytest.mark.parametrize("family", MIXTURES)
def test_in_float32_nothing_changes_and_a_copy_stands_alone(family: str) -> None:
    plain = tiny_model(family)
    ours = copy.deepcopy(plain)
    shard_experts(ours)
    use_float32_routers(ours)
    other = copy.deepcopy(ours)
    for model in (ours, other):
        assert_close(model(TOKENS).logits.detach(), plain(TOKENS).logits.detach(), "logits", 1e-6)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert_close(other(TOKENS).logits.detach(), plain(TOKENS).logits.detach(), "logits of the copy", 1e-6)


def test_what_routers_do_is_told_by_known_numbers() -> None:
    # 4 tokens, 2 of 4 experts each: expert 0 is asked 4 times, 1 twice, 2 twice, 3 never
    chosen = torch.tensor([[0, 1], [0, 2], [2, 0], [0, 1]])
    uniform = Routing(torch.zeros(4, 4), chosen)
    certain = Routing(torch.tensor([[100.0, 0, 0, 0]]).repeat(4, 1), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]]))
    assert expert_counts(uniform, torch.arange(4)).tolist() == [4, 2, 2, 0]
    assert expert_counts(uniform, torch.tensor([1, 1, 2])).tolist() == [3, 0, 3, 0]
    metrics = routing_metrics([uniform, certain])
    assert metrics["experts/busiest"] == Mean(2.0 + 1.0, 2)
    assert metrics["experts/busiest_max"] == Max(2.0)
    assert metrics["experts/idle"] == Mean(1.0, 8)
    assert metrics["experts/router_entropy"].value == pytest.approx(torch.tensor(4.0).log().item() / 2)
    assert routing_metrics([]) == {}


def nothing() -> Metrics:
    return {}


def mixtral(layers: int) -> tuple[CausalLM, TokenBatch]:
    plain = tiny_model("mixtral", num_hidden_layers=layers)
    return CausalLM.wrap(copy.deepcopy(plain)), rollout_batch(plain)


def plain_balance_loss(batch: TokenBatch, layers: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Transformers' formula on all predictions of the batch, layer by layer, and the gradients with a policy loss."""
    plain = tiny_model("mixtral", num_hidden_layers=layers)
    rows: list[list[Tensor]] = [[] for _ in range(layers)]
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        output = plain(batch.token_ids[start:end][None], output_router_logits=True)
        learnt = batch.token_columns["loss_mask"][start + 1 : end]
        for layer, logits in enumerate(output.router_logits):
            rows[layer].append(logits[:-1][learnt])
    losses = [load_balancing_loss_func((torch.cat(found),), 8, 2) for found in rows]
    balance = torch.stack(losses).sum()
    policy = plain_policy_loss(plain_logprobs(plain, batch, temperature=1.0), batch)
    (policy + 0.5 * balance).backward()
    return balance.detach(), gradients(plain)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_balance_loss_is_that_of_the_whole_batch_however_it_is_cut(layers: int) -> None:
    model, batch = mixtral(layers)
    expected, plain_gradients = plain_balance_loss(batch, layers)
    assert expected > 2.01 * layers  # 2 experts a token: uneven
    for max_tokens, share_prefixes in ((10_000, True), (10_000, False), (60, True), (1, False)):
        model.module.zero_grad()
        scorer = Scorer(model, share_prefixes=share_prefixes)
        objective = ClippedPolicyObjective(kl_weight=0.1)
        metrics = train_step(
            scorer, batch, objective, max_tokens=max_tokens, update=nothing, balance=Balance(coefficient=0.5)
        )
        assert metrics["balance_loss"].value == pytest.approx(expected.item(), rel=1e-5)
        for name, gradient in gradients(model.module).items():
            assert_close(gradient, plain_gradients[name], name, 3e-5)


def test_biases_move_towards_equal_loads() -> None:
    batch = rollout_batch(tiny_model("deepseek_v3"))
    model = CausalLM.wrap(tiny_model("deepseek_v3"))
    uneven: list[float] = []
    bias = next(iter(router_modules(model.module).values())).e_score_correction_bias
    for _ in range(30):
        before = bias.clone()
        metrics = train_step(
            Scorer(model),
            batch,
            ClippedPolicyObjective(),
            max_tokens=60,
            update=nothing,
            balance=Balance(bias_rate=0.02),
        )
        model.module.zero_grad()
        uneven.append(metrics["balance_loss"].value)
        assert (bias - before).abs().max() == pytest.approx(0.02, rel=1e-3)
    assert uneven[-1] < uneven[0]
    counts = torch.tensor([[5, 1, 1, 1, 0, 0, 0, 0]])
    bias.zero_()
    update_biases(model.module, counts, 0.1)
    assert bias.tolist() == pytest.approx([-0.1, 0, 0, 0, 0.1, 0.1, 0.1, 0.1])


def test_what_cannot_be_balanced_is_refused() -> None:
    with pytest.raises(ConfigError, match="MixtralForCausalLM has no biases"):
        Balance(bias_rate=0.1).check(tiny_model("mixtral"), takes_plans=True)
    for family, takes_plans in (("llama", True), ("mixtral", False)):
        with pytest.raises(ConfigError, match="ForCausalLM has no experts that could be balanced on packed"):
            Balance(coefficient=0.1).check(tiny_model(family), takes_plans)
    Balance(0.1, 0.1).check(tiny_model("deepseek_v3"), takes_plans=True)


def test_a_step_tells_how_evenly_experts_were_asked() -> None:
    model, batch = mixtral(2)
    objective = ClippedPolicyObjective()
    metrics = merge([train_step(Scorer(model), batch, objective, max_tokens=60, update=nothing)])
    assert metrics["experts/busiest"].value > 1
    assert "balance_loss" not in metrics
    dense = CausalLM.wrap(tiny_model("llama"))
    assert not [
        name
        for name in train_step(Scorer(dense), batch, objective, max_tokens=60, update=nothing)
        if name.startswith("experts/")
    ]
