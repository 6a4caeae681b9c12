"""Collectives that autograd looks through.

Of what the ranks of a group call backward on, the sum is the loss. So a value that reached every rank gets the sum of
its gradients there: gathering has the adjoint of scattering sums, and an exchange that of the way back.
"""

from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 gave these two a new name and warns of the old one
_gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # pyright: ignore[reportDeprecated]
_scatter_sum: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # pyright: ignore[reportDeprecated]


def all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Put a tensor [n, ...] of one shape of all c ranks behind each other: [c*n, ...] on every rank; differentiable."""
    return cast(Tensor, _AllGather.apply(tensor, group))


def exchange(blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send block s of [c, ...] to rank s; block s of the result came from rank s. Differentiable."""
    return cast(Tensor, _Exchange.apply(blocks, group))


class _Context(Protocol):
    """What a forward pass leaves for its backward pass."""

    group: dist.ProcessGroup


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = tensor.new_empty(group.size() * len(tensor), *tensor.shape[1:])
        _gather_into(gathered, tensor.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        own = grad.new_empty(len(grad) // ctx.group.size(), *grad.shape[1:])
        _scatter_sum(own, grad.contiguous(), group=ctx.group)
        return own, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(blocks, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, blocks.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return exchange(grad, ctx.group), None
