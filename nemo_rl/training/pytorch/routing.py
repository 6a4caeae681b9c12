"""Routers of mixtures of experts: computed in float32, watched, and kept from asking the same experts always.

Applied from outside to the routers of Transformers, which return logits, weights and the chosen experts.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.func import functional_call

from nemo_rl.errors import ConfigError
from nemo_rl.metrics import Max, Mean, Metrics, Sum
from nemo_rl.training.pytorch.experts import expert_modules


def router_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Find the router of every layer of experts by name, from the first layer to the last."""
    routers: dict[str, nn.Module] = {}
    for name, _ in expert_modules(model):
        block = name.rpartition(".")[0]
        children = model.get_submodule(block).named_children()
        leaf, router = next((leaf, child) for leaf, child in children if leaf in ("gate", "router"))
        routers[f"{block}.{leaf}"] = router
    return routers


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
    for router in router_modules(model).values():
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
def watched_routers(model: nn.Module, note: Callable[[int, Routing], Tensor | None]) -> Generator[None]:
    """Call `note` with a router's number and what it did, whenever one runs within; never if the model is dense.

    A scalar that it returns joins the loss: the backward pass that reaches the router's weights runs through it too,
    with a gradient of 1, wherever the loss itself is computed (a later stage of a pipeline).
    """

    def after(number: int, _: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> tuple[Tensor, ...] | None:
        del inputs
        floating = [output for output in outputs if output.is_floating_point()]
        logits = max(floating, key=lambda output: output.shape[-1])
        chosen = next(output for output in outputs if not output.is_floating_point())
        addend = note(number, Routing(logits, chosen))
        if addend is None:
            return None
        weights = next(output for output in floating if output is not logits)
        return tuple(_Join.apply(weights, addend) if output is weights else output for output in outputs)

    routers = router_modules(model).values()
    hooks = [router.register_forward_hook(partial(after, number)) for number, router in enumerate(routers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, addend: Tensor) -> Tensor:
        ctx.save_for_backward(addend)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones_like(ctx.saved_tensors[0])


def expert_counts(routing: Routing, tokens: Tensor) -> Tensor:
    """How often each expert is chosen by `tokens` int64 [M] of a stream: int64 [E]."""
    chosen = routing.chosen[tokens.to(routing.chosen.device)]
    return chosen.flatten().bincount(minlength=routing.logits.shape[-1])


def balance_loss(routing: Routing, tokens: Tensor, counts: Tensor) -> Tensor:
    """Load-balancing loss of a layer in a micro-batch, a part of that in the global batch.

    `E * sum_e f_e P_e`: f_e is the number of times that a token chooses expert e, P_e its mean probability, a softmax
    of the logits (Fedus et al. 2022, https://arxiv.org/abs/2101.03961, equations 4 to 6). It is K where all experts are
    asked alike. f_e has no gradient, so with `counts` from the global batch the parts add up to the loss and the
    gradient of the whole, however it is cut (https://arxiv.org/abs/2501.11873).

    Args:
        routing: of the micro-batch.
        tokens: int64 [M], stream positions that count.
        counts: int64 [E], `expert_counts` of the global batch.

    Returns:
        A scalar in float32.
    """
    asked = counts.float()
    num_tokens = asked.sum() / routing.chosen.shape[1]
    probability = routing.logits[tokens.to(routing.logits.device)].float().softmax(-1).sum(0) / num_tokens
    return len(asked) * (asked / num_tokens * probability).sum()


@dataclass(frozen=True, slots=True)
class Balance:
    """Keep the experts of a mixture equally busy.

    The tokens that count are those whose prediction carries loss, once for each such prediction, so that neither
    packing nor sharing of prefixes changes anything. Both means need the counts of the whole global batch before its
    first backward pass; they are taken in a forward pass of their own.

    Attributes:
        coefficient: of `balance_loss`, summed over layers; 0 adds none.
        bias_rate: of `update_biases`; 0 changes none.
        group: the ranks that share a global batch; None is this process alone.
    """

    coefficient: float = 0.0
    bias_rate: float = 0.0
    group: ProcessGroup | None = None

    def check(self, model: nn.Module, takes_plans: bool) -> None:
        """Look at the whole model before it is trained.

        Raises:
            ConfigError: it has nothing to balance, or no biases to move.
        """
        name = type(model).__name__
        if not (router_modules(model) and takes_plans):
            raise ConfigError(
                f"{name} has no experts that could be balanced on packed tokens; set policy.moe.balance_coefficient and"
                " policy.moe.bias_update_rate to 0"
            )
        if self.bias_rate and len(selection_biases(model)) < len(router_modules(model)):
            raise ConfigError(
                f"{name} has no biases that choose experts; set policy.moe.bias_update_rate to 0 and use "
                "policy.moe.balance_coefficient"
            )

    def total(self, counts: Tensor) -> Tensor:
        """Add up the ranks' counts, int64 [layers, E]."""
        if self.group is not None:
            dist.all_reduce(counts, group=self.group)
        return counts


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """Counts how often predictions choose each expert, over several micro-batches.

    Attributes:
        model: whose routers are watched.
        by_layer: int64 [E] for each router so far, by its number.
    """

    model: nn.Module
    by_layer: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def over(self, tokens: Tensor, counts: bool) -> AbstractContextManager[None]:
        """Watch a micro-batch in which `tokens` int64 [M] predict; padding does not count."""

        def note(number: int, routing: Routing) -> None:
            found = expert_counts(routing, tokens if counts else tokens[:0])
            self.by_layer[number] = self.by_layer.get(number, 0) + found

        return watched_routers(self.model, note)

    def stacked(self) -> Tensor:
        """All of them, int64 [layers, E]; a stage of a pipeline may have no layer with experts."""
        found = [self.by_layer[number] for number in sorted(self.by_layer)]
        return torch.stack(found) if found else torch.zeros(0, 0, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class RouterWatch:
    """Describes what the routers do in the micro-batches of a step, and lets the balance loss join theirs.

    Attributes:
        model: whose routers are watched.
        coefficient: of `balance_loss`.
        counts: int64 [layers, E] of the global batch; None adds no balance loss.
        metrics: of each micro-batch so far that counts: those of `routing_metrics`, and `balance_loss` before its
            coefficient, summed over layers.
    """

    model: nn.Module
    coefficient: float = 0.0
    counts: Tensor | None = None
    metrics: list[Metrics] = field(default_factory=list[Metrics])

    @contextmanager
    def over(self, tokens: Tensor, counts: bool) -> Generator[None]:
        """Watch a micro-batch in which `tokens` int64 [M] predict; padding does not count."""
        routings: list[Routing] = []
        uneven: list[Tensor] = []

        def note(number: int, routing: Routing) -> Tensor | None:
            routings.append(Routing(routing.logits.detach(), routing.chosen))
            if self.counts is None or not counts:
                return None
            loss = balance_loss(routing, tokens, self.counts[number])
            uneven.append(loss.detach())
            return self.coefficient * loss

        with watched_routers(self.model, note):
            yield
        if counts:
            self.metrics.append(routing_metrics(routings))
        if uneven:
            self.metrics.append({"balance_loss": Sum(float(torch.stack(uneven).sum()))})


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
    everyone = [torch.arange(len(each.chosen)) for each in routings]
    counts = torch.stack([expert_counts(each, tokens) for each, tokens in zip(routings, everyone, strict=True)])
    busiest = counts.amax(1) / counts.double().mean(1).clamp_min(1e-9)
    entropy = [torch.distributions.Categorical(logits=each.logits.float()).entropy().sum() for each in routings]
    figures = [busiest.sum(), busiest.max(), (counts == 0).sum(), torch.stack(entropy).sum()]
    total, most, idle, spread = torch.stack([figure.double() for figure in figures]).tolist()
    return {
        "experts/busiest": Mean(total, len(busiest)),
        "experts/busiest_max": Max(most),
        "experts/idle": Mean(idle, counts.numel()),
        "experts/router_entropy": Mean(spread, sum(len(each.logits) for each in routings)),
    }


def selection_biases(model: nn.Module) -> dict[str, Tensor]:
    """Name the buffers, [E], that are added to the scores of a layer's experts where experts are chosen."""
    leaf = "e_score_correction_bias"
    found = {name: dict(router.named_buffers()) for name, router in router_modules(model).items()}
    return {f"{name}.{leaf}": buffers[leaf] for name, buffers in found.items() if leaf in buffers}


@torch.no_grad()
def update_biases(model: nn.Module, counts: Tensor, rate: float) -> None:
    """Move the biases that only choose experts by `rate` towards equal loads, after an optimizer step.

    `b_e += rate * sign(mean load - load_e)` (Wang et al. 2024, https://arxiv.org/abs/2408.15664), as DeepSeek-V3 was
    trained.

    Args:
        model: whose every router has such a bias.
        counts: int64 [layers, E] of the global batch.
        rate: how far a bias moves.
    """
    for bias, asked in zip(selection_biases(model).values(), counts.float(), strict=True):
        bias.add_(rate * (asked.mean() - asked).sign())
