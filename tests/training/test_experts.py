"""Divided experts give the numbers of undivided ones: values, and every gradient summed over the ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from nemo_rl.data.packing import build_stream
from nemo_rl.errors import ConfigError
from nemo_rl.models.attention import TreeAttention
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.models.local import local_part
from nemo_rl.training.pytorch.experts import exchange, expert_modules, grouped_product, shard_experts
from nemo_rl.training.pytorch.routing import use_float32_routers
from nemo_rl.training.pytorch.shards import whole
from ranks import run_ranks
from tiny_experts import MIXTURES, assert_close, gradients, rank_batch, weighted
from tiny_models import tiny_model
from tiny_streams import plain_logprobs, stream_logprobs


def run_rank(rank: int, family: str) -> dict[str, Any]:
    model = CausalLM.wrap(tiny_model(family))
    full = {name: parameter.detach().clone() for name, parameter in model.module.named_parameters()}
    size = dist.get_world_size()
    sharded = shard_experts(model.module, init_device_mesh("cpu", (size,)))
    stream = build_stream(rank_batch(rank), min_shared=4)
    logprobs = stream_logprobs(model, stream, TreeAttention(stream.tree))
    weighted(logprobs, rank).backward()
    for name in sharded:
        parameter = model.module.get_parameter(name)
        assert len(parameter.to_local()) == 8 // size
        assert torch.equal(whole(parameter), full[name])
    found = {name: local_part(gradient) for name, gradient in gradients(model.module).items()}
    return {"sharded": sharded, "logprobs": logprobs.detach(), "gradients": found}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", MIXTURES)
def test_ranks_with_unlike_tokens_equal_one_process(family: str, size: int) -> None:
    plain = tiny_model(family)
    plain.set_attn_implementation("eager")
    plain.set_experts_implementation("eager")
    expected = [plain_logprobs(plain, rank_batch(rank)) for rank in range(size)]
    torch.stack([weighted(logprobs, rank) for rank, logprobs in enumerate(expected)]).sum().backward()
    ranks = run_ranks(run_rank, size, family)
    sharded = ranks[0]["sharded"]
    assert {name.rsplit(".", 1)[1] for name in sharded} >= {"gate_up_proj", "down_proj"}
    for rank, result in enumerate(ranks):
        assert_close(result["logprobs"], expected[rank].detach(), f"log-probabilities of rank {rank}")
    for name, gradient in gradients(plain).items():
        parts = [result["gradients"][name] for result in ranks]
        # experts: each rank's slice is complete; all others: ranks have seen a part of the tokens each
        assert_close(torch.cat(parts) if name in sharded else torch.stack(parts).sum(0), gradient, name, 3e-5)


@pytest.mark.parametrize("family", MIXTURES)
def test_one_process_with_grouped_products_equals_transformers(family: str) -> None:
    plain, ours = tiny_model(family), tiny_model(family)
    plain.set_experts_implementation("eager")
    assert shard_experts(ours)
    tokens = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(0))
    logits = [model(tokens).logits for model in (plain, ours)]
    assert_close(logits[1].detach(), logits[0].detach(), "logits")
    for found in logits:
        found.square().sum().backward()
    for name, gradient in gradients(plain).items():
        assert_close(ours.get_parameter(name).grad, gradient, name)


def routed(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rank 0: 5 tokens, rank 1: 3, rank 2: none. Experts 4 to 7, hence ranks 2 and 3, are asked by nobody."""
    index = [[[0, 1], [0, 3], [1, 0], [0, 2], [0, 1]], [[0, 1], [1, 0], [3, 0]], [], [[1, 0]]][rank]
    generator = torch.Generator().manual_seed(rank)
    chosen = torch.tensor(index, dtype=torch.long).view(-1, 2)
    return torch.randn(len(index), 32, generator=generator), chosen, torch.rand(len(index), 2, generator=generator)


def run_uneven_rank(rank: int, family: str) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    model = tiny_model(family)
    shard_experts(model, init_device_mesh("cpu", (4,)))
    experts = list(expert_modules(model))[-1][1]
    states, index, weights = routed(rank)
    inputs = [states.requires_grad_(), weights.requires_grad_()]
    output = experts(states, index, weights)
    output.square().sum().backward()
    found = {name: local_part(gradient) for name, gradient in gradients(experts).items()}
    return output.detach(), [grad for tensor in inputs if (grad := tensor.grad) is not None], found


@pytest.mark.parametrize("family", MIXTURES)
def test_ranks_that_have_no_token_or_get_none_take_part(family: str) -> None:
    plain = tiny_model(family)
    plain.set_experts_implementation("eager")
    experts = list(expert_modules(plain))[-1][1]
    states, index, weights = (torch.cat(parts) for parts in zip(*(routed(rank) for rank in range(4)), strict=True))
    inputs = [states.requires_grad_(), weights.requires_grad_()]
    expected = experts(states, index, weights)
    expected.square().sum().backward()
    ranks = run_ranks(run_uneven_rank, 4, family)
    assert_close(torch.cat([output for output, _, _ in ranks]), expected.detach(), "output")
    for number, tensor in enumerate(inputs):
        assert_close(torch.cat([found[number] for _, found, _ in ranks]), tensor.grad, f"gradient of input {number}")
    for name, gradient in gradients(experts).items():
        assert_close(torch.cat([found[name] for _, _, found in ranks]), gradient, name)
        assert all(not found[name].any() for _, _, found in ranks[2:]), name  # zeros, not None


def test_experts_that_cannot_be_divided_are_refused() -> None:
    assert shard_experts(tiny_model("llama")) == ()
    run_ranks(refuse, 3)


def refuse(rank: int) -> None:
    del rank
    with pytest.raises(ConfigError, match="8 experts of MixtralExperts cannot be divided among 3 ranks"):
        shard_experts(tiny_model("mixtral"), init_device_mesh("cpu", (3,)))


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs_first", [True, False])
@pytest.mark.parametrize("sizes", [(16, 24), (5, 7)])  # a kernel knows the first, a loop runs for the second
@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 7, 0, 0], [0, 0, 0, 0]])
def test_grouped_products_equal_a_loop(
    counts: list[int], sizes: tuple[int, int], inputs_first: bool, dtype: torch.dtype, device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(counts), sizes[0], generator=generator).to(device, dtype).requires_grad_()
    shape = sizes if inputs_first else sizes[::-1]
    weight = torch.randn(4, *shape, generator=generator).to(device, dtype).requires_grad_()
    output = grouped_product(rows, weight, counts, inputs_first=inputs_first)
    # a gradient whose rows do not lie one after the other
    direction = torch.randn(sizes[1], sum(counts), generator=generator).to(device, dtype).t()
    found = torch.autograd.grad(output, (rows, weight), direction)
    exact_rows, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (rows, weight))
    matrices = exact_weight if inputs_first else exact_weight.transpose(1, 2)
    exact = torch.cat([part @ matrix for part, matrix in zip(exact_rows.split(counts), matrices, strict=True)])
    expected = torch.autograd.grad(exact, (exact_rows, exact_weight), direction.double())
    for got, want in ((output, exact), *zip(found, expected, strict=True)):
        assert got.dtype == dtype
        assert_close(got.detach().double(), want.detach(), "product", 1e-6 if dtype == torch.float32 else 1e-2)


def run_exchange(rank: int) -> tuple[Tensor, Tensor]:
    rows = (10.0 * rank + torch.arange(3.0))[:, None].requires_grad_()
    sent, received = ([1, 2], [1, 0]) if rank == 0 else ([0, 3], [2, 3])
    output = exchange(rows, sent, received, dist.group.WORLD)
    (found,) = torch.autograd.grad((output * (1 + rank)).sum(), rows)
    return output.detach()[:, 0], found[:, 0]


def test_rows_go_where_they_are_sent_and_gradients_come_back() -> None:
    (to_first, back_to_first), (to_second, back_to_second) = run_ranks(run_exchange, 2)
    assert to_first.tolist() == [0]
    assert to_second.tolist() == [1, 2, 10, 11, 12]
    assert back_to_first.tolist() == [1, 2, 2]
    assert back_to_second.tolist() == [2, 2, 2]


def test_autocast_reaches_the_experts() -> None:
    plain, ours = tiny_model("mixtral"), tiny_model("mixtral")
    shard_experts(ours)
    tokens = torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(0))
    dtypes: list[torch.dtype] = []
    act = next(iter(expert_modules(ours)))[1].act_fn
    act.register_forward_hook(lambda _, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        low = ours(tokens).logits
    assert set(dtypes) == {torch.bfloat16}
    exact = plain(tokens).logits.detach()
    assert (low.float() - exact).norm() < 0.1 * exact.norm()


def rank_tokens(rank: int) -> Tensor:
    return torch.randint(3, 128, (1, 20 - 3 * rank), generator=torch.Generator().manual_seed(rank))


def rank_loss(model: nn.Module, rank: int) -> Tensor:
    logits = model(rank_tokens(rank), use_cache=False).logits
    return (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(100 + rank))).sum()


def run_fully_sharded_rank(rank: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "expert"))
    everyone = init_device_mesh("cpu", (4,))
    model = tiny_model("qwen3_moe")
    sharded = shard_experts(model, mesh["expert"])
    use_float32_routers(model)
    experts = [module for _, module in expert_modules(model)]
    for module in experts:
        fully_shard(module, mesh=mesh["shard"])
    for layer in model.model.layers:
        fully_shard(layer, mesh=everyone)
    fully_shard(model, mesh=everyone)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    rank_loss(model, rank).backward()
    assert all(len(model.get_parameter(name).to_local()) == 2 for name in sharded)  # of 8 experts
    return {name: whole(gradient) for name, gradient in gradients(model).items()}


def test_divided_experts_can_be_fully_sharded_along_the_other_ranks() -> None:
    plain = tiny_model("qwen3_moe")
    torch.stack([rank_loss(plain, rank) for rank in range(4)]).sum().backward()
    for found in run_ranks(run_fully_sharded_rank, 4):
        for name, gradient in gradients(plain).items():
            assert_close(found[name], gradient, name, 3e-5)
