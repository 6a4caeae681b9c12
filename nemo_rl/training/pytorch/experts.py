"""Expert parallelism: every rank of a group holds a part of the experts and computes it for the tokens of all ranks.

Applied from outside to the `Experts` modules of Transformers, whose parameters are stacked along the experts. A rank
sends every token to the ranks that hold its experts and gets the outputs back, so ranks may have unlike tokens and
unlike numbers of them. No token is dropped and none is padded. What the backward pass leaves on a rank is the gradient
of its experts summed over the tokens of the whole group: the group is a part of the data-parallel ranks, and over it
the experts' gradients must not be summed again. A rank without tokens takes part in the exchange all the same, so all
ranks of a group run equally many forward and backward passes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from nemo_rl.errors import ConfigError
from nemo_rl.models.local import local_part


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Find the modules that hold stacked experts, by name; a dense model has none."""
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        # what Transformers' decorator of such classes writes on them
        if "down_proj" in parameters and parameters["down_proj"].dim() == 3 and hasattr(module, "is_transposed"):
            yield name, module


def shard_experts(model: nn.Module, mesh: DeviceMesh | None = None) -> tuple[str, ...]:
    """Leave each rank of a mesh its part of the experts, and compute all experts by sorted, grouped products.

    Rank r of e ranks keeps the experts `[r*E/e, (r+1)*E/e)`, as the local part of a `DTensor` that is sharded along the
    experts. Call it with the same full weights on all ranks (or on the meta device), and before anything else is
    sharded; `fully_shard` may divide the parts further along another axis of the same mesh.

    Args:
        model: any module that contains Transformers' experts; changed in place.
        mesh: one axis, the ranks that share the experts; None or one rank keeps them all, as plain tensors.

    Returns:
        Names of the parameters of experts; none if the model is dense.

    Raises:
        ConfigError: the number of experts is not a multiple of that of the ranks.
    """
    size = 1 if mesh is None else mesh.size()
    names: list[str] = []
    for name, module in expert_modules(model):
        stacked = dict(module.named_parameters(recurse=False))
        num_experts = len(stacked["down_proj"])
        if num_experts % size:
            raise ConfigError(
                f"{num_experts} experts of {type(module).__name__} cannot be divided among {size} ranks; choose an "
                f"expert_parallel_size that divides {num_experts}"
            )
        if mesh is not None and size > 1:
            for leaf, parameter in stacked.items():
                setattr(module, leaf, _own_part(parameter, mesh))
        names += [f"{name}.{leaf}" for leaf in stacked]
        # on the instance, so that the class and other models of it stay as they are
        module.forward = _ShardedExperts(module, num_experts, None if mesh is None or size == 1 else mesh.get_group())
    return tuple(names)


def _own_part(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    part = parameter.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
    return nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)]), requires_grad=parameter.requires_grad)


@dataclass(frozen=True, slots=True)
class _ShardedExperts:
    """The forward pass of an experts module whose parameters are a rank's part.

    Attributes:
        module: Transformers' module.
        num_experts: E, of all ranks.
        group: the ranks that share the experts, or None if this one has all.
    """

    module: nn.Module
    num_experts: int
    group: ProcessGroup | None

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Combine each token's K experts: [T, H], int64 [T, K], [T, K] -> [T, H]."""
        num_tokens, top_k = top_k_index.shape
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=self.num_experts)  # pairs of a token and an expert, by expert
        rows = hidden_states[order // top_k]  # its gradient is summed in float32 and in one order
        if self.group is None:
            rows = expert_rows(self.module, rows, counts.tolist())
        else:
            rows = self._on_their_ranks(rows, counts, self.group)
        outputs = rows.index_select(0, order.argsort()).unflatten(0, (num_tokens, top_k))
        return (outputs * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)

    def _on_their_ranks(self, rows: Tensor, counts: Tensor, group: ProcessGroup) -> Tensor:
        """Have rows [P, H], sorted by expert, computed where their experts are; same order: [P, H]."""
        to_come = torch.empty_like(counts)
        dist.all_to_all_single(to_come, counts, group=group)
        size = dist.get_world_size(group)
        # [2, e, E/e]: what I send to and receive from each rank, by its and by my experts; one wait for the device
        sent, received = torch.stack([counts, to_come]).view(2, size, -1).cpu()
        num_sent, num_received = sent.sum(1).tolist(), received.sum(1).tolist()
        rows = exchange(rows, num_sent, num_received, group)
        # they come sorted by rank, then by expert
        expert = torch.arange(received.shape[1]).repeat(size).repeat_interleave(received.flatten())
        by_expert = expert.argsort(stable=True).to(rows.device)
        rows = expert_rows(self.module, rows.index_select(0, by_expert), received.sum(0).tolist())
        return exchange(rows.index_select(0, by_expert.argsort()), num_received, num_sent, group)


def expert_rows(module: nn.Module, rows: Tensor, counts: list[int]) -> Tensor:
    """Run L experts over rows sorted by expert, `counts[i]` of them for expert i: [P, H] -> [P, H].

    Args:
        module: an experts module of Transformers; what it says of its layout is followed.
        rows: [P, H] in the order of the experts.
        counts: L numbers that sum to P; 0 gives that expert a zero gradient.
    """
    up = _linear(module, "gate_up_proj" if module.has_gate else "up_proj", rows, counts)
    hidden: Tensor = module._apply_gate(up) if module.has_gate else module.act_fn(up)  # pyright: ignore
    return _linear(module, "down_proj", hidden, counts)


def _linear(module: nn.Module, name: str, rows: Tensor, counts: list[int]) -> Tensor:
    output = grouped_product(
        rows, local_part(module.get_parameter(name)), counts, inputs_first=bool(module.is_transposed)
    )
    if not module.has_bias:
        return output
    bias = local_part(module.get_parameter(f"{name}_bias"))
    repeats = torch.tensor(counts, device=rows.device)
    return output + bias.repeat_interleave(repeats, 0, output_size=len(rows)).to(output.dtype)


def grouped_product(rows: Tensor, weight: Tensor, counts: list[int], *, inputs_first: bool) -> Tensor:
    """Multiply each group of rows by its own matrix: [P, I], L lengths that sum to P -> [P, O].

    In the dtype of autocast where it is on, and in one kernel where there is one for the dtype and the sizes.

    Args:
        rows: [P, I], group after group.
        weight: [L, I, O] if `inputs_first`, else [L, O, I].
        counts: the lengths; a group of 0 rows gives its matrix a zero gradient.
        inputs_first: how `weight` is stored.
    """
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    rows, weight = rows.to(dtype), weight.to(dtype)
    is_aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    if is_aligned and len(rows) and (device == "cpu" or dtype == torch.bfloat16):
        return _GroupedProduct.apply(rows, weight, counts, inputs_first)
    matrices = (weight if inputs_first else weight.transpose(1, 2)).unbind()
    return torch.cat([group @ matrix for group, matrix in zip(rows.split(counts), matrices, strict=True)])


class _GroupedProduct(torch.autograd.Function):
    """`grouped_mm` with a backward pass of its own.

    That of PyTorch 2.13 needs a contiguous gradient, and on some GPUs it leaves arbitrary numbers in the gradients of
    matrices without rows (https://github.com/pytorch/pytorch/issues/172439).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: list[int], inputs_first: bool) -> Tensor:
        ends = torch.tensor(counts, device=rows.device).cumsum(0, dtype=torch.int32)
        ctx.save_for_backward(rows, weight, ends)
        ctx.empty = [group for group, count in enumerate(counts) if not count]
        ctx.inputs_first = inputs_first
        return F.grouped_mm(rows, weight if inputs_first else weight.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weight, ends = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_rows = of_weight = None
        if ctx.needs_input_grad[0]:
            of_rows = F.grouped_mm(gradient, weight.transpose(1, 2) if ctx.inputs_first else weight, offs=ends)
        if ctx.needs_input_grad[1]:
            left, right = (rows, gradient) if ctx.inputs_first else (gradient, rows)
            of_weight = F.grouped_mm(left.t(), right, offs=ends)
            of_weight[ctx.empty] = 0
        return of_rows, of_weight, None, None


def exchange(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    """Send the first `sent[0]` rows to rank 0 of the group, the next to rank 1 ...; get `received[r]` from each.

    [sum(sent), H] -> [sum(received), H]; gradients travel back the same way.
    """
    return _Exchange.apply(rows, sent, received, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        ctx.way_back = received, sent, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradients[0], *ctx.way_back), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    output = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(output, rows.contiguous(), received, sent, group=group)
    return output
