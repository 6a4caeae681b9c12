"""Routers of mixtures of experts: computed in float32, watched, and kept from asking the same experts always.

Applied from outside to the routers of Transformers, which return logits, weights and the chosen experts.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.func import functional_call

from nemo_rl.errors import ModelError
from nemo_rl.metrics import Max, Mean, Metrics
from nemo_rl.training.pytorch.experts import expert_modules


def router_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Find the router of every layer of experts, from the first layer to the last."""
    for name, _ in expert_modules(model):
        block = model.get_submodule(name.rpartition(".")[0])
        yield next(child for leaf, child in block.named_children() if leaf in ("gate", "router"))


class _OwnForward(nn.Module):
    """Calls what a router's class defines, past what stands on the instance, so that weights can be lent to it."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, hidden_states: Tensor) -> Any:
        return type(self.router).forward(self.router, hidden_states)


@dataclass(frozen=True, slots=True)
class _Float32Router:
    router: nn.Module

    def __call__(self, hidden_states: Tensor) -> Any:
        own = _OwnForward(self.router)
        weights = {name: parameter.float() for name, parameter in own.named_parameters()}
        with torch.autocast(hidden_states.device.type, enabled=False):
            return functional_call(own, weights, (hidden_states.float(),))


def use_float32_routers(model: nn.Module) -> None:
    """Let the routers compute in float32 from inputs and weights of any dtype, under autocast too; changes in place.

    A rounded logit chooses other experts, and the sampler and the trainer then run different models. The weights keep
    their dtype.
    """
    for router in router_modules(model):
        router.forward = _Float32Router(router)  # on the instance: other models of the class stay as they are


@dataclass(frozen=True, slots=True)
class Routing:
    """What one router did with the S tokens of a stream.

    Attributes:
        logits: [S, E].
        chosen: int64 [S, K].
    """

    logits: Tensor
    chosen: Tensor


@contextmanager
def record_routing(model: nn.Module) -> Generator[list[Routing]]:
    """Collect what the routers do in the forward passes within, layer after layer; nothing if the model is dense."""
    routings: list[Routing] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        del module, inputs
        chosen = next(output for output in outputs if not output.is_floating_point())
        logits = max((output for output in outputs if output.is_floating_point()), key=lambda output: output.shape[-1])
        routings.append(Routing(logits, chosen))

    hooks = [router.register_forward_hook(note) for router in router_modules(model)]
    try:
        yield routings
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def routing_metrics(routings: Sequence[Routing]) -> Metrics:
    """Describe how evenly the experts are asked; nothing for a dense model.

    Returns:
        `experts/busiest` and `experts/busiest_max`: tokens of a layer's busiest expert by the mean of its experts, mean
        and maximum over layers and micro-batches; `experts/idle`: share of experts without a token;
        `experts/router_entropy`: mean entropy of the softmax of the logits, in nats.
    """
    if not routings:
        return {}
    counts = expert_counts(routings).double()
    busiest = counts.amax(1) / counts.mean(1).clamp_min(1e-9)
    entropy = sum(torch.distributions.Categorical(logits=each.logits.float()).entropy().sum() for each in routings)
    asked, most, idle, total = torch.stack(
        [busiest.sum(), busiest.max(), (counts == 0).sum(), torch.as_tensor(entropy).double().to(counts.device)]
    ).tolist()
    return {
        "experts/busiest": Mean(asked, len(busiest)),
        "experts/busiest_max": Max(most),
        "experts/idle": Mean(idle, counts.numel()),
        "experts/router_entropy": Mean(total, sum(len(each.logits) for each in routings)),
    }


def expert_counts(routings: Sequence[Routing], tokens: Tensor | None = None) -> Tensor:
    """How often each expert is chosen, int64 [layers, E]; `tokens` int64 [M] counts those of a stream, None all."""
    return torch.stack(
        [
            (each.chosen if tokens is None else each.chosen[tokens.to(each.chosen.device)])
            .flatten()
            .bincount(minlength=each.logits.shape[-1])
            for each in routings
        ]
    )


@dataclass(frozen=True, slots=True)
class Balance:
    """Keep the experts of a mixture equally busy.

    The tokens that count are those whose prediction carries loss, once for each such prediction, so that neither
    packing nor sharing of prefixes changes anything. Both means need the counts of the whole global batch before its
    first backward pass; they are taken in a forward pass of their own.

    Attributes:
        coefficient: of `balance_loss`; 0 adds none.
        bias_rate: of `update_biases`; 0 changes none.
        group: the ranks that share a global batch; None is this process alone.
    """

    coefficient: float = 0.0
    bias_rate: float = 0.0
    group: ProcessGroup | None = None

    def penalty(self, counts: Tensor) -> "BalancePenalty":
        """Give what the micro-batches of a step need, from this rank's `expert_counts`; all ranks must ask."""
        if self.group is not None:
            dist.all_reduce(counts, group=self.group)
        return BalancePenalty(self.coefficient, counts)


@dataclass(frozen=True, slots=True)
class BalancePenalty:
    """How the loss of a step's micro-batches punishes uneven loads.

    Attributes:
        coefficient: of `balance_loss`.
        counts: int64 [layers, E], `expert_counts` of the global batch.
    """

    coefficient: float
    counts: Tensor


def balance_loss(routings: Sequence[Routing], tokens: Tensor, counts: Tensor) -> Tensor:
    """Load-balancing loss of a micro-batch, a part of that of the global batch.

    `E * sum_e f_e P_e`, mean over layers: f_e is the number of times that a token chooses expert e, P_e its mean
    probability, a softmax of the logits (Fedus et al. 2022, https://arxiv.org/abs/2101.03961, equations 4 to 6). It is
    K where all experts are asked alike. f_e has no gradient, so with `counts` from the global batch the parts add up to
    the loss and the gradient of the whole, however it is cut (https://arxiv.org/abs/2501.11873).

    Args:
        routings: of the micro-batch, one for each layer.
        tokens: int64 [M], stream positions that count.
        counts: int64 [layers, E], `expert_counts` of the global batch.

    Returns:
        A scalar in float32.
    """
    parts: list[Tensor] = []
    for each, asked in zip(routings, counts.float(), strict=True):
        num_tokens = asked.sum() / each.chosen.shape[1]
        probability = each.logits[tokens.to(each.logits.device)].float().softmax(-1).sum(0) / num_tokens
        parts.append(len(asked) * (asked / num_tokens * probability).sum())
    return torch.stack(parts).mean()


def selection_biases(model: nn.Module) -> dict[str, Tensor]:
    """Name the buffers, [E], that are added to the scores of a layer's experts where experts are chosen.

    Raises:
        ModelError: a router of the model has none.
    """
    leaf = "e_score_correction_bias"
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith(leaf)}
    if len(biases) != len(list(router_modules(model))):
        raise ModelError(
            f"{type(model).__name__} has no biases that choose experts; set policy.moe.bias_update_rate to 0 and use "
            "policy.moe.balance_coefficient"
        )
    return biases


@torch.no_grad()
def update_biases(model: nn.Module, counts: Tensor, rate: float) -> None:
    """Move the biases that only choose experts by `rate` towards equal loads, after an optimizer step.

    `b_e += rate * sign(mean load - load_e)` (Wang et al. 2024, https://arxiv.org/abs/2408.15664), as DeepSeek-V3 was
    trained.

    Args:
        model: with routers that have such a bias.
        counts: int64 [layers, E], `expert_counts` of the global batch.
        rate: how far a bias moves.

    Raises:
        ModelError: the model has no such biases.
    """
    for bias, asked in zip(selection_biases(model).values(), counts.float(), strict=True):
        bias.add_(rate * (asked.mean() - asked).sign())
