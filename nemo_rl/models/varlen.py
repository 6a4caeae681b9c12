"""A whole segment tree in one call of a variable-length attention kernel, where the GPU has one.

PyTorch has FlashAttention-2 over sequences that lie one after the other, causal from the bottom right: with fewer
queries than keys the last query sees the last key, which is what a branch behind its ancestors needs.
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_rl.data.packing import SegmentTree
from nemo_rl.data.transfer import moved

_log = logging.getLogger(__name__)

_WIDEST_HEAD = 256
"""The kernel has no code for wider heads."""

_TOLERANCE = 2e-2
"""Relative error of bfloat16 attention that a working kernel stays below."""


def can_use_varlen(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes q [S, A, D], k and v [S, A_kv, D], and does on this device what it should.

    It takes half precision on a GPU and heads of one width for queries, keys and values, a multiple of 8 up to 256.
    Formulas with a soft cap or sinks are not its own, whatever the tensors.
    """
    width = q.shape[-1]
    fits = k.shape[-1] == v.shape[-1] == width and width % 8 == 0 and width <= _WIDEST_HEAD
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    return q.is_cuda and is_half and fits and q.shape[1] % k.shape[1] == 0 and _works_on(q.device)


@dataclass(frozen=True, slots=True)
class VarlenTree:
    """A segment tree as the kernel reads it.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: int32 [R+1], on the device.
        longest_q, longest_k: queries and keys of the longest segment.
        kv_index: int64 [K], on the device, or None where the keys lie in that order.
        num_keys: K.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    longest_q: int
    longest_k: int
    kv_index: Tensor | None
    num_keys: int

    @classmethod
    def of(cls, tree: SegmentTree, device: torch.device | str) -> "VarlenTree":
        """Put a tree on a device."""
        in_order = torch.equal(tree.kv_index, torch.arange(len(tree.kv_index)))
        return cls(
            cu_seqlens_q=moved(tree.cu_seqlens_q.int(), device),
            cu_seqlens_k=moved(tree.cu_seqlens_k.int(), device),
            longest_q=int(tree.cu_seqlens_q.diff().max()),
            longest_k=int(tree.cu_seqlens_k.diff().max()),
            kv_index=None if in_order else moved(tree.kv_index, device),
            num_keys=len(tree.kv_index),
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int) -> Tensor:
        """Attend with q [S, A, D], k and v [S, A_kv, D] that `can_use_varlen` accepts: [S, A, D].

        With a `window` above 0 a query sees only the last `window` keys, itself included.
        """
        if self.kv_index is None and len(k) > self.num_keys:  # those behind are seen from other ranks
            k, v = k[: self.num_keys], v[: self.num_keys]
        return cast(Tensor, _Attention.apply(q, k, v, self, scale, window))

    def seen(self, x: Tensor) -> Tensor:
        """Keys or values in the order in which segments see them: [K, A_kv, D]."""
        return x if self.kv_index is None else x.index_select(0, self.kv_index)

    def sent_back(self, grad_k: Tensor, grad_v: Tensor, length: int) -> tuple[Tensor, ...]:
        """Turn gradients [K, A_kv, D] of what is seen into those [S, A_kv, D] of the stream, summed in float32."""
        if self.kv_index is None:
            return grad_k, grad_v
        both = torch.stack((grad_k, grad_v))
        total = both.new_zeros((2, length, *both.shape[2:]), dtype=torch.float32)
        return total.index_add_(1, self.kv_index, both.float()).to(both.dtype).unbind()

    def arguments(self) -> tuple[Tensor, Tensor, int, int]:
        """What both operators of the kernel are told of the tree."""
        longest_q = max(2, self.longest_q)  # for a single query some versions take a path without a backward pass
        return self.cu_seqlens_q, self.cu_seqlens_k, longest_q, self.longest_k


class _Attention(torch.autograd.Function):
    """Gather, kernel and their gradients as one node of the graph.

    Between kernels this short a GPU waits for the host, which PyTorch's `varlen_attn`, a wrapper of the same two
    operators in Python, keeps busy for longer than all the rest of a layer's attention does.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tree: VarlenTree, scale: float, window: int) -> Tensor:
        options = {"scale": scale, "window_size_left": window - 1 if window else -1, "window_size_right": 0}
        output, log_sums, *state, _ = torch.ops.aten._flash_attention_forward(
            q, tree.seen(k), tree.seen(v), *tree.arguments(), 0.0, not window, False, **options
        )
        ctx.save_for_backward(q, k, v, output, log_sums, *state)
        ctx.tree, ctx.options = tree, options
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, output, log_sums, *state = ctx.saved_tensors
        tree: VarlenTree = ctx.tree
        grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
            grad,
            q,
            tree.seen(k),
            tree.seen(v),
            output,
            log_sums,
            *tree.arguments(),
            0.0,
            ctx.options["window_size_left"] < 0,
            *state,
            **ctx.options,
        )
        return grad_q, *tree.sent_back(grad_k, grad_v, len(k)), None, None, None


@cache
def _works_on(device: torch.device) -> bool:
    """Try the kernel once with all that is asked of it: a branch behind its ancestor, shared key heads, a window."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        try:
            errors = [_probe(device, window) for window in (0, 3)]
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            _log.warning("no variable-length attention kernel on %s, segments run in buckets: %s", device, error)
            return False
    if max(errors) <= _TOLERANCE:
        return True
    _log.warning(
        "the variable-length attention kernel on %s is off by %.1e, segments run in buckets", device, max(errors)
    )
    return False


def _probe(device: torch.device, window: int) -> float:
    """Relative error of the kernel, values and gradients, on a root of 4 tokens and a branch of 3 behind it."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 4, 16), (7, 2, 16), (7, 2, 16), (7, 4, 16)]
    drawn = [torch.randn(shape, generator=generator).bfloat16().to(device) for shape in shapes]
    tree = SegmentTree(
        torch.tensor([0, 4, 7]), torch.tensor([0, 4, 11]), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6])
    )
    inputs = [x.detach().requires_grad_() for x in drawn[:3]]
    exact = [x.detach().float().requires_grad_() for x in drawn[:3]]
    found = VarlenTree.of(tree, device).attend(*inputs, scale=0.25, window=window)
    expected = _formula(*exact, scale=0.25, window=window)
    pairs = [
        (found, expected),
        *zip(
            torch.autograd.grad(found, inputs, drawn[3]),
            torch.autograd.grad(expected, exact, drawn[3].float()),
            strict=True,
        ),
    ]
    return max(float((one.float() - other).detach().norm() / other.detach().norm()) for one, other in pairs)


def _formula(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int) -> Tensor:
    """Attention as it is written, over one causal sequence: what a root and the branch behind it come to together."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    position = torch.arange(len(q), device=q.device)
    distance = position[:, None] - position
    hidden = (distance < 0) | (distance >= window) if window else distance < 0
    scores = (torch.einsum("qad,kad->aqk", q, k) * scale).masked_fill(hidden, -torch.inf)
    return torch.einsum("aqk,kad->qad", scores.softmax(-1), v)
