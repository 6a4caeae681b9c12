"""The kernel for a whole tree is given that tree; on a CPU a plain loop stands in for the kernel, which it has not."""

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


def loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """FlashAttention's rule, sequence after sequence: the last query sees the last key, and so many to its left."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert longest_q == int(cu_q.diff().max()) and longest_k == int(cu_k.diff().max())
    outputs: list[Tensor] = []
    for r in range(len(cu_q) - 1):
        queries, keys, values = q[cu_q[r] : cu_q[r + 1]], k[cu_k[r] : cu_k[r + 1]], v[cu_k[r] : cu_k[r + 1]]
        last = torch.arange(len(queries))[:, None] + len(keys) - len(queries)
        distance = last - torch.arange(len(keys))
        seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        heads = [x.transpose(0, 1) for x in (queries, keys, values)]
        outputs.append(
            F.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale, enable_gqa=True).transpose(0, 1)
        )
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_a_tree_in_one_call_is_that_tree_in_buckets(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_kernel", loop)
    inputs = [torch.randn(13, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    upstream = torch.randn(13, 4, 8)
    found = VarlenTree.of(TREE, "cpu").attend(*inputs, scale=0.3, window=window)
    expected = TreeAttention(TREE).attend(0, *inputs, Weighting(0.3, window))
    torch.testing.assert_close(found, expected)
    gradients: list[Any] = [torch.autograd.grad(output, inputs, upstream) for output in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_probe_tells_a_kernel_that_works_from_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    works_on = varlen._works_on.__wrapped__
    monkeypatch.setattr(varlen, "_kernel", loop)
    assert works_on(torch.device("cpu"))

    def from_the_top(*args: Any, **options: Any) -> Tensor:
        """Aligns queries with the first keys, as a kernel for square attention would."""
        q, k, v, cu_q, cu_k, *rest = args
        kept = torch.cat([torch.arange(int(a), int(a + n)) for a, n in zip(cu_k, cu_q.diff(), strict=False)])
        return loop(q, k[kept], v[kept], cu_q, cu_q, rest[0], rest[0], **options)

    def missing(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no such operator")

    for broken in (from_the_top, missing):
        monkeypatch.setattr(varlen, "_kernel", broken)
        assert not works_on(torch.device("cpu"))


def test_a_cpu_has_no_such_kernel_and_needs_no_pinned_memory() -> None:
    q = torch.randn(3, 2, 8).bfloat16()
    assert not can_use_varlen(q, q, q)
    assert moved(q, "cpu") is q


def test_keys_that_nothing_shares_are_not_gathered() -> None:
    whole = torch.tensor([0, 4, 9])
    assert VarlenTree.of(SegmentTree(whole, whole, torch.arange(9)), "cpu").kv_index is None
