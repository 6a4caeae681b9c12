"""Draw tokens from logits, and say how likely each draw was under the distribution actually sampled from.

Every request has its own random numbers: one uniform in [0, 1) a token, decided by its seed alone. A token is drawn by
inverting the cumulative distribution at that number, so what a request gets does not depend on its neighbours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_rl.data.types import SamplingParams


def uniforms(seed: int, length: int) -> Tensor:
    """float32 [length] in [0, 1), a function of the seed alone."""
    return torch.rand(length, generator=torch.Generator().manual_seed(seed))


class Sampler:
    """Samples tokens, each row of logits by its own `SamplingParams`.

    The common case (no truncation) never sorts.
    """

    def __init__(self, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device)[:, None]

        self._greedy = torch.tensor([p.temperature == 0 for p in params], device=device)[:, None]
        self._any_greedy = bool(self._greedy.any())
        self._all_greedy = bool(self._greedy.all())
        self._temperature = column([p.temperature or 1.0 for p in params])
        self._scaled = any(p.temperature not in (0, 1.0) for p in params)
        self._top_p = column([p.top_p for p in params])
        self._top_k = torch.tensor([p.top_k for p in params], device=device)[:, None]
        self._min_p = column([p.min_p for p in params])
        self._truncates = any(p.top_p < 1 or p.top_k > 0 or p.min_p > 0 for p in params)

    def __call__(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Sample K tokens a row from logits float32 [n, V] at uniform float32 [n, K], in [0, 1).

        Returns:
            tokens int64 [n, K] and their log-probabilities float32 [n, K]. A greedy row's distribution is certain, so
            its log-probability is 0. The logits may be overwritten.
        """
        best = logits.argmax(-1, keepdim=True).expand_as(uniform) if self._any_greedy else None
        if self._all_greedy and best is not None:
            return best, torch.zeros_like(uniform)
        if self._scaled:
            logits = logits.div_(self._temperature)
        if self._truncates:
            logits = self._truncated(logits)
        mass = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
        cumulative = mass.cumsum(-1)
        total = cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, uniform * total, right=True)
        beyond = tokens == logits.shape[-1]
        if beyond.any():  # rounding can push the very last number past the end; the likeliest token is always legal
            tokens = torch.where(beyond, mass.argmax(-1, keepdim=True), tokens)
        logprobs = (mass.gather(-1, tokens) / total).log()
        if best is None:
            return tokens, logprobs
        return torch.where(self._greedy, best, tokens), torch.where(self._greedy, 0.0, logprobs)

    def _truncated(self, logits: Tensor) -> Tensor:
        """Set the logits that top-k, then top-p, then min-p remove to -inf; the best token always stays."""
        ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
        rank = torch.arange(logits.shape[-1], device=logits.device)
        removed = (self._top_k > 0) & (rank >= self._top_k)
        probability = ordered.masked_fill(removed, -torch.inf).softmax(-1)
        before = probability.cumsum(-1) - probability
        removed |= (self._top_p < 1) & (before >= self._top_p)
        removed |= probability < self._min_p * probability[:, :1]
        removed[:, 0] = False
        return logits.masked_fill(removed.gather(-1, order.argsort(-1)), -torch.inf)
