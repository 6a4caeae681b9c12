"""Optimizers by name, master weights that keep what bfloat16 would round away, clipping over what has a gradient."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from nemo_rl.errors import ConfigError
from nemo_rl.training.pytorch.optim import MasterWeights, build_optimizer, build_scheduler
from nemo_rl.training.pytorch.shards import clip_grad_norm
from tiny_models import tiny_model

LINEAR: dict[str, Any] = {
    "name": "torch.optim.lr_scheduler.LinearLR",
    "kwargs": {"start_factor": 0.25, "total_iters": 3},
}
HALF: dict[str, Any] = {"name": "torch.optim.lr_scheduler.ConstantLR", "kwargs": {"factor": 0.5, "total_iters": 99}}


def _parameter(size: int = 2) -> nn.Parameter:
    return nn.Parameter(torch.ones(size))


def test_an_optimizer_is_built_by_path_and_fused_unless_told_otherwise() -> None:
    shared = _parameter()
    optimizer = build_optimizer([shared, shared], "torch.optim.AdamW", {"lr": 0.5, "betas": [0.8, 0.9]})
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["fused"], len(group["params"])) == (0.5, (0.8, 0.9), True, 1)
    assert not build_optimizer([shared], "torch.optim.AdamW", {"lr": 1.0, "foreach": True}).param_groups[0]["fused"]
    assert isinstance(build_optimizer([shared], "torch.optim.Rprop", {"lr": 1.0}), torch.optim.Rprop)


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("torch.optim.AdamWW", {}, "no Optimizer at the import path 'torch.optim.AdamWW'"),
        ("no_such_module.AdamW", {}, "no Optimizer at the import path"),
        ("AdamW", {}, "no Optimizer at the import path 'AdamW'"),
        ("torch.nn.Linear", {}, "is not a Optimizer; name a class such as torch.optim.AdamW"),
        ("torch.optim.AdamW", {"learning_rate": 1.0}, "AdamW refuses the arguments .*learning_rate"),
        ("torch.optim.AdamW", {"lr": -1.0}, "AdamW refuses the arguments .*Invalid learning rate"),
    ],
)
def test_an_optimizer_that_cannot_be_built_says_why(name: str, kwargs: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_optimizer([_parameter()], name, kwargs)


@pytest.mark.parametrize(
    ("chain", "rates"),
    [
        ((), [1.0, 1.0, 1.0, 1.0, 1.0]),
        ((LINEAR,), [0.25, 0.5, 0.75, 1.0, 1.0]),
        ((LINEAR, HALF, {"milestones": (3,)}), [0.25, 0.5, 0.75, 0.5, 0.5]),
    ],
)
def test_a_chain_of_schedulers_gives_these_learning_rates(chain: tuple[Any, ...], rates: list[float]) -> None:
    parameter = _parameter()
    optimizer = build_optimizer([parameter], "torch.optim.AdamW", {"lr": 1.0})
    scheduler = build_scheduler(optimizer, chain)
    seen: list[float] = []
    for _ in rates:
        seen.append(optimizer.param_groups[0]["lr"])
        parameter.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx(rates)


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        ((LINEAR, HALF), r"2 schedules in a row need 1 rising milestones between them, not \[\]"),
        ((LINEAR, {"milestones": [3]}), "1 schedules in a row need 0"),
        ((LINEAR, HALF, HALF, {"milestones": [3, 2]}), r"not \[3, 2\]"),
        (({"name": "torch.optim.AdamW"},), "is not a LRScheduler"),
        (({"name": LINEAR["name"], "kwargs": {"steps": 1}},), "LinearLR refuses the arguments .*steps"),
        (({"name": "torch.optim.lr_scheduler.ReduceLROnPlateau"},), "decides by a metric"),
        ((LINEAR, {"name": "torch.optim.lr_scheduler.ReduceLROnPlateau"}, {"milestones": [3]}), "decides by a metric"),
    ],
)
def test_a_chain_that_cannot_be_built_says_why(chain: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_scheduler(build_optimizer([_parameter()], "torch.optim.AdamW", {"lr": 1.0}), chain)


def test_float32_weights_are_their_own_masters() -> None:
    model = tiny_model(tie_word_embeddings=True)
    masters = MasterWeights(model)
    assert [id(weight) for weight in masters.parameters] == [id(weight) for weight in model.parameters()]


def test_many_steps_too_small_for_bfloat16_arrive_through_the_masters() -> None:
    model = nn.Linear(4, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    masters = MasterWeights(model)
    optimizer = build_optimizer(masters.parameters, "torch.optim.SGD", {"lr": 1e-4})
    storage = model.weight.data_ptr()
    for _ in range(100):
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        masters.publish()
    assert masters.named["weight"].tolist()[0] == pytest.approx([0.99] * 4, abs=1e-5)
    assert model.weight.tolist()[0] == [0.98828125] * 4  # 0.99 in bfloat16; stepped directly it would still be 1
    assert model.weight.data_ptr() == storage


def test_gradients_of_micro_batches_add_up_in_float32_and_leave_the_model() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    masters = MasterWeights(model)
    for scale in (256.0, 1.0, 1.0):
        model(torch.full((1, 1), scale, dtype=torch.bfloat16)).sum().backward()
    gradient = masters.named["weight"].grad
    assert gradient is not None
    assert gradient.item() == 258.0  # in bfloat16 256 + 1 is 256
    assert model.weight.grad is None


def test_tied_and_frozen_weights_have_one_master_and_none() -> None:
    model = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=True)
    model.get_parameter("model.norm.weight").requires_grad_(False)
    masters = MasterWeights(model)
    assert "model.embed_tokens.weight" in masters.named
    assert not {"lm_head.weight", "model.norm.weight"} & masters.named.keys()
    assert all(weight.dtype == torch.float32 for weight in masters.parameters)


@pytest.mark.parametrize(("max_norm", "left"), [(None, 3.0), (10.0, 3.0), (2.5, 1.5)])
def test_clipping_returns_the_norm_and_scales_all_gradients_alike(max_norm: float | None, left: float) -> None:
    first, second, without = _parameter(1), _parameter(1), _parameter(1)
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip_grad_norm([first, second, without, first], max_norm) == 5.0
    assert first.grad.item() == pytest.approx(left)
    assert second.grad.item() == pytest.approx(left * 4 / 3)
    assert clip_grad_norm([without], max_norm) == 0.0


def test_a_norm_that_is_not_finite_is_reported_and_changes_nothing() -> None:
    parameter = _parameter()
    parameter.grad = torch.tensor([math.inf, 1.0])
    assert clip_grad_norm([parameter], 1.0) == math.inf
    assert parameter.grad.tolist() == [math.inf, 1.0]
