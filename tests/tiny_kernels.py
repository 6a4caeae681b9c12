"""Compare the Triton kernels of the head with its formula, interpreted; Triton decides at its import whether it does.

TRITON_INTERPRET=1 python tests/tiny_kernels.py
"""

import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_rl.objectives import chunked_head as heads
from nemo_rl.objectives import softmax_kernels as kernels
from nemo_rl.objectives.logprobs import token_logprobs


def results(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    logprobs, entropy = token_logprobs(*inputs[:2], target, temperature=0.7, chunk_size=20, bias=inputs[2])
    upstream = torch.linspace(-1, 1, len(target))
    return [logprobs.detach(), entropy, *torch.autograd.grad(logprobs, inputs, upstream)]


def whole_head() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*shape, generator=generator) for shape in ((11, 8), (300, 8), (300,))]
    target = torch.tensor([0, 299, 127, 128, 5, 5, 200, 255, 256, 1, 150])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        inputs = [x.to(dtype) for x in drawn]
        expected = results(*(x.float() for x in inputs), target)
        with mock.patch.object(heads, "_kernels", lambda *_: kernels):
            found = results(*inputs, target)
        for one, other in zip(found, expected, strict=True):
            assert (one.float() - other).norm() <= tolerance * other.norm(), dtype


def extreme_logits() -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)) * 1000
    logits[1, 7:] = -torch.inf
    logits[2, 5] = torch.nan
    target = torch.tensor([4, 3, 0])
    logprobs, log_sums, entropies = torch.empty(3, 3).unbind()
    kernels.row_statistics(logits, target, 1.0, logprobs=logprobs, log_sums=log_sums, entropies=entropies)
    expected = logits[:2].log_softmax(-1)
    torch.testing.assert_close(logprobs[:2], expected.gather(-1, target[:2, None])[:, 0])
    torch.testing.assert_close(log_sums[:2], logits[:2].logsumexp(-1))
    torch.testing.assert_close(entropies[:2], torch.special.entr(expected.exp()).sum(-1))
    assert logprobs[2].isnan()


if __name__ == "__main__":
    kernels._BLOCK = 128  # so that a small vocabulary spans several blocks
    whole_head()
    extreme_logits()
