"""Draw tokens from logits, and say how likely each draw was under the distribution actually sampled from.

Every request has its own random numbers: one uniform in [0, 1) a token, decided by its seed alone. A token is drawn by
inverting the cumulative distribution at that number, so what a request gets does not depend on its neighbours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_rl.data.types import SamplingParams
from nemo_rl.errors import BackendError
from nemo_rl.objectives.truncation import WHOLE, Truncation, truncated_logits


def uniforms(seed: int, length: int) -> Tensor:
    """float32 [length] in [0, 1), a function of the seed alone."""
    return torch.rand(length, generator=torch.Generator().manual_seed(seed))


class Sampler:
    """Samples tokens, each row of logits by its own `SamplingParams`.

    The common case (no truncation) never orders the tokens.
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
        self._truncates = any(Truncation(p.top_p, p.top_k, p.min_p) != WHOLE for p in params)

    def __call__(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Sample K tokens a row from logits float32 [n, V] at uniform float32 [n, K], in [0, 1).

        Returns:
            tokens int64 [n, K] and their log-probabilities float32 [n, K]. A greedy row's distribution is certain, so
            its log-probability is 0. The logits may be overwritten.

        Raises:
            BackendError: a logit is NaN or +inf, or all of a row are -inf.
        """
        best = logits.argmax(-1, keepdim=True) if self._any_greedy else None
        if self._all_greedy and best is not None:
            _check(logits.gather(-1, best))
            return best.expand_as(uniform), torch.zeros_like(uniform)
        if self._scaled:
            logits = logits.div_(self._temperature)
        if self._truncates:
            logits = truncated_logits(logits, top_p=self._top_p, top_k=self._top_k, min_p=self._min_p)
        peak = logits.amax(-1, keepdim=True)
        _check(peak)
        mass = logits.sub_(peak).exp_()
        cumulative = mass.cumsum(-1)
        total = cumulative[:, -1:]
        # a float32 below 1 times the total rounds to a number below the total: no draw falls past the last token
        tokens = torch.searchsorted(cumulative, uniform * total, right=True)
        logprobs = (mass.gather(-1, tokens) / total).log()
        if best is None:
            return tokens, logprobs
        return torch.where(self._greedy, best, tokens), torch.where(self._greedy, 0.0, logprobs)


def _check(peak: Tensor) -> None:
    """Refuse rows whose largest logit (a NaN counts as such) is not finite; peak is float32 [n, 1]."""
    if not peak.isfinite().all():
        raise BackendError(
            "the sampler got logits that are not finite, so the policy's weights are damaged or have diverged; resume "
            "from an earlier checkpoint with a lower learning rate, or check the model"
        )
