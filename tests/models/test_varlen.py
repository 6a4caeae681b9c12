"""The kernel for a whole tree is given that tree; on a CPU a plain loop stands in for the kernel, which it has not."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_rl.data.packing import SegmentTree
from nemo_rl.data.transfer import moved
from nemo_rl.models import varlen
from nemo_rl.models.attention import TreeAttention, Weighting
from nemo_rl.models.varlen import VarlenTree, can_use_varlen

TREE = SegmentTree(  # a root of 4, two branches of 3 and 1 behind it, and a sequence of 5 on its own
    torch.tensor([0, 4, 7, 8, 13]),
    torch.tensor([0, 4, 11, 16, 21]),
    torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 7, 8, 9, 10, 11, 12]),
)


type Attend = Callable[..., Tensor]
"""From q, k, v, both cu_seqlens and the keys to the left that are seen (all if negative) to the output."""


def loop(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, left: int) -> Tensor:
    """FlashAttention's rule, sequence after sequence: the last query sees the last key, and so many to its left."""
    outputs: list[Tensor] = []
    for r in range(len(cu_q) - 1):
        queries, keys, values = q[cu_q[r] : cu_q[r + 1]], k[cu_k[r] : cu_k[r + 1]], v[cu_k[r] : cu_k[r + 1]]
        last = torch.arange(len(queries))[:, None] + len(keys) - len(queries)
        distance = last - torch.arange(len(keys))
        seen = (distance >= 0) & ((distance <= left) | (left < 0))
        heads = [x.transpose(0, 1) for x in (queries, keys, values)]
        outputs.append(F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True).transpose(0, 1))
    return torch.cat(outputs)


@contextmanager
def flash_on_cpu(attend: Attend = loop) -> Generator[None]:
    """Give PyTorch's two operators a CPU implementation, which it has not; it checks how they are called."""

    def scaled(q: Tensor, scale: float) -> Tensor:
        return q * (scale * q.shape[-1] ** 0.5)

    def check(cu_q: Tensor, cu_k: Tensor, longest: tuple[int, int], is_causal: bool, left: int, right: int) -> None:
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert longest == (max(2, int(cu_q.diff().max())), int(cu_k.diff().max()))
        assert is_causal == (left < 0) and right == 0

    def forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: Any, **options: Any) -> Any:
        longest_q, longest_k, dropout, is_causal, _ = rest
        scale, left, right = (options[name] for name in ("scale", "window_size_left", "window_size_right"))
        check(cu_q, cu_k, (longest_q, longest_k), is_causal, left, right)
        assert dropout == 0
        state = torch.zeros(2)
        return attend(scaled(q, scale), k, v, cu_q, cu_k, left), q.new_zeros(q.shape[1], len(q)), state, state, state

    def backward(grad: Tensor, *inputs: Tensor, **options: Any) -> Any:
        q, k, v, _, _, cu_q, cu_k = inputs[:7]
        scale, left = options["scale"], options["window_size_left"]
        check(cu_q, cu_k, inputs[7:9], inputs[10], left, options["window_size_right"])  # pyright: ignore

        def gradients() -> Any:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            output = attend(scaled(leaves[0], scale), *leaves[1:], cu_q, cu_k, left)
            return torch.autograd.grad(output, leaves, grad)

        with ThreadPoolExecutor(1) as thread:  # on this one, within an operator, nothing records gradients
            return thread.submit(gradients).result()

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


@pytest.mark.parametrize("window", [0, 1, 3])
def test_a_tree_in_one_call_is_that_tree_in_buckets(window: int) -> None:
    inputs = [torch.randn(13, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    upstream = torch.randn(13, 4, 8)
    with flash_on_cpu():
        found = VarlenTree.of(TREE, "cpu").attend(*inputs, scale=0.3, window=window)
        gradients: list[Any] = [torch.autograd.grad(found, inputs, upstream)]
    expected = TreeAttention(TREE).attend(0, *inputs, Weighting(0.3, window))
    torch.testing.assert_close(found, expected)
    gradients.append(torch.autograd.grad(expected, inputs, upstream))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_keys_behind_those_of_the_tree_get_no_gradient() -> None:
    whole = torch.tensor([0, 4, 9])
    q, k, v = (torch.randn(length, 2, 8, requires_grad=True) for length in (9, 12, 12))
    with flash_on_cpu():
        found = VarlenTree.of(SegmentTree(whole, whole, torch.arange(9)), "cpu").attend(q, k, v, scale=0.3, window=0)
        grad_k, grad_v = torch.autograd.grad(found.sum(), (k, v))
    assert grad_k.shape == k.shape and grad_k[:9].any() and not grad_k[9:].any() and not grad_v[9:].any()


def test_the_probe_tells_a_kernel_that_works_from_one_that_does_not() -> None:
    works_on = varlen._works_on.__wrapped__
    with flash_on_cpu():
        assert works_on(torch.device("cpu"))

    def from_the_top(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, left: int) -> Tensor:
        """Aligns queries with the first keys, as a kernel for square attention would."""
        kept = torch.cat([torch.arange(int(a), int(a + n)) for a, n in zip(cu_k, cu_q.diff(), strict=False)])
        return loop(q, k[kept], v[kept], cu_q, cu_q, left)

    with flash_on_cpu(from_the_top):
        assert not works_on(torch.device("cpu"))
    assert not works_on(torch.device("cpu"))  # as there is no such operator


def test_a_cpu_has_no_such_kernel_and_needs_no_pinned_memory() -> None:
    q = torch.randn(3, 2, 8).bfloat16()
    assert not can_use_varlen(q, q, q)
    assert moved(q, "cpu") is q


def test_keys_that_nothing_shares_are_not_gathered() -> None:
    whole = torch.tensor([0, 4, 9])
    assert VarlenTree.of(SegmentTree(whole, whole, torch.arange(9)), "cpu").kv_index is None
