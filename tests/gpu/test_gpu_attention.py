"""On a GPU all segments of a tree run in one kernel, and it is the attention that buckets compute."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.packing import SegmentTree, build_stream
from nemo_rl.models import varlen
from nemo_rl.models.attention import TreeAttention, Weighting
from tiny_gpu import needs_gpu

pytestmark = needs_gpu


def tree(*, share: bool) -> SegmentTree:
    """Three groups of four answers behind prompts of up to 300 tokens."""
    generator = torch.Generator().manual_seed(0)
    sequences: list[Tensor] = []
    masks: list[Tensor] = []
    for prompt_length in (300, 17, 128):
        prompt = torch.randint(1000, (prompt_length,), generator=generator)
        for length in (1, 33, 200, 64):
            sequences.append(torch.cat([prompt, torch.randint(1000, (length + 1,), generator=generator)]))
            masks.append(torch.arange(prompt_length + length + 1) >= prompt_length)
    lengths = torch.tensor([0] + [len(sequence) for sequence in sequences])
    groups = torch.arange(3).repeat_interleave(4)
    batch = TokenBatch(torch.cat(sequences), lengths.cumsum(0), groups, {"loss_mask": torch.cat(masks)})
    return build_stream(batch, share_prefixes=share).tree


def attend(plan: TreeAttention, inputs: list[Tensor], upstream: Tensor, weighting: Weighting, *, buckets: bool) -> Any:
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = plan.attend_in_buckets(*inputs, weighting) if buckets else plan.attend(0, *inputs, weighting)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def test_the_kernel_of_this_machine_works() -> None:
    assert varlen._works_on(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 4, 64), (12, 2, 128), (4, 1, 256)])
@pytest.mark.parametrize("share", [False, True])
def test_the_kernel_computes_what_buckets_do(
    share: bool, heads: int, key_heads: int, width: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert varlen._works_on(torch.device("cuda", 0))  # tried before it is watched
    calls: list[Any] = []
    attend_in_kernel = varlen.VarlenTree.attend

    def watched(*args: Any, **options: Any) -> Tensor:
        calls.append(options)
        return attend_in_kernel(*args, **options)

    monkeypatch.setattr(varlen.VarlenTree, "attend", watched)
    layout = tree(share=share)
    num_tokens = int(layout.cu_seqlens_q[-1])
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(num_tokens, count, width) for count in (heads, key_heads, key_heads, heads)]
    *inputs, upstream = [torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes]
    plan, weighting = TreeAttention(layout, "cuda"), Weighting(width**-0.5, window)
    exact = attend(plan, [x.float() for x in inputs], upstream.float(), weighting, buckets=True)
    assert not calls
    found = attend(plan, inputs, upstream, weighting, buckets=False)
    assert len(calls) == 1 and found[0].dtype == torch.bfloat16
    for one, other in zip(found, exact, strict=True):
        assert (one.float() - other).norm() <= 1e-2 * other.norm()


@pytest.mark.parametrize("changes", [{"softcap": 1.5}, {"sinks": torch.tensor([2.0, 0.5, -1.0, 0.0])}])
def test_other_formulas_run_in_buckets(changes: dict[str, Any]) -> None:
    layout = tree(share=True)
    changes = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in changes.items()}
    q, k, v = (torch.randn(int(layout.cu_seqlens_q[-1]), heads, 32, device="cuda") for heads in (4, 2, 2))
    plan, weighting = TreeAttention(layout, "cuda"), Weighting(0.2, **changes)
    on_cpu = Weighting(0.2, **{name: x.cpu() if isinstance(x, Tensor) else x for name, x in changes.items()})
    expected = TreeAttention(layout).attend(0, q.cpu(), k.cpu(), v.cpu(), on_cpu)
    torch.testing.assert_close(plan.attend(0, q, k, v, weighting).cpu(), expected, rtol=1e-4, atol=1e-5)
    low = plan.attend(0, q.bfloat16(), k.bfloat16(), v.bfloat16(), weighting)
    assert (low.float().cpu() - expected).norm() <= 1e-2 * expected.norm()


def test_packed_segments_are_not_gathered() -> None:
    layout = varlen.VarlenTree.of(tree(share=False), "cuda")
    assert layout.kv_index is None
    assert max(end - start for start, end in pairwise(layout.cu_seqlens_q.tolist())) == layout.longest_q
