"""On a GPU the head runs its kernels: the plain formula, in less memory than whole logits take."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_rl.objectives import chunked_head as heads
from nemo_rl.objectives.logprobs import token_logprobs
from tiny_gpu import needs_gpu

pytestmark = needs_gpu


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    everything = (F.linear(hidden, weight, bias) / 0.7).log_softmax(-1)
    return everything.gather(-1, target[:, None])[:, 0], torch.special.entr(everything.exp()).sum(-1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("vocabulary", [300, 32003])
def test_the_kernels_are_the_plain_formula(vocabulary: int, dtype: torch.dtype, tolerance: float) -> None:
    assert heads._kernels(torch.device("cuda"), dtype) is not None
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((333, 64), (vocabulary, 64), (vocabulary,))
    drawn = [torch.randn(*shape, generator=generator, device="cuda") * 0.3 for shape in shapes]
    inputs = [x.to(dtype).requires_grad_() for x in drawn]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    target = torch.randint(vocabulary, (333,), generator=generator, device="cuda")
    upstream = torch.randn(333, generator=generator, device="cuda")
    found = token_logprobs(*inputs[:2], target, temperature=0.7, chunk_size=100, bias=inputs[2])
    expected = plain(*exact, target)
    pairs = [
        *zip(found, expected, strict=True),
        *zip(
            torch.autograd.grad(found[0], inputs, upstream),
            torch.autograd.grad(expected[0], exact, upstream.double()),
            strict=True,
        ),
    ]
    for one, other in pairs:
        assert (one.double() - other).norm() <= tolerance * other.norm()


def peak_bytes(*, chunked: bool) -> int:
    hidden = torch.randn(4096, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(65536, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(65536, (4096,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if chunked:
        token_logprobs(hidden, weight, target, chunk_size=512)[0].sum().backward()
    else:
        F.cross_entropy(F.linear(hidden, weight).float(), target).backward()
    return torch.cuda.max_memory_allocated() - before


def test_the_head_takes_less_memory_than_whole_logits() -> None:
    peak_bytes(chunked=True)  # what the libraries keep from the first call on
    assert peak_bytes(chunked=True) <= peak_bytes(chunked=False) / 6
