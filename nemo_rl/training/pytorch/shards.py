"""Tensors that are spread over ranks: the whole of one, and the norm of many of them."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, without gradient; of one that is spread every rank of its mesh must ask."""
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The ranks that a tensor is spread over."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def by_mesh[T: Tensor](tensors: Iterable[T]) -> list[list[T]]:
    """Put tensors that are spread over the same ranks together, in the order in which their meshes first appear."""
    groups: dict[DeviceMesh | None, list[T]] = {}
    for tensor in tensors:
        groups.setdefault(mesh_of(tensor), []).append(tensor)
    return list(groups.values())


def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    max_norm: float | None,
    combine: Callable[[Tensor], Tensor] | None = None,
    counted_elsewhere: nn.Parameter | None = None,
) -> float:
    """Scale the gradients down to a total 2-norm of `max_norm`, all by one factor.

    Args:
        parameters: those without a gradient are passed over, a tied one counts once. They may be spread over unlike
            meshes; each counts once, however many ranks hold it.
        max_norm: None only measures.
        combine: adds up the squared norms [] of ranks that hold different parameters (pipeline stages).
        counted_elsewhere: one that another of those ranks holds too, and counts.

    Returns:
        The norm before scaling. If it is not finite the gradients are left as they are, for the caller to drop.
    """
    groups = by_mesh(dict.fromkeys(parameters))
    counted = ([p for p in group if p is not counted_elsewhere] for group in groups)
    norms = [norm for group in counted if (norm := _norm(group)) is not None]
    if combine is not None or len(norms) > 1:
        square = torch.stack([norm.square() for norm in norms]).sum()
        norm = (square if combine is None else combine(square)).sqrt()
    else:
        norm = norms[0] if norms else torch.tensor(0.0)
    value = float(norm)
    if max_norm is not None and max_norm < value < float("inf"):
        for group in groups:
            clip_grads_with_norm_(group, max_norm, norm)
    return value


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """2-norm [] of the gradients of parameters on one mesh; None if there are none."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return whole(get_total_norm(grads)) if grads else None
