"""Truncated sampling: which tokens top-k, top-p and min-p leave to be drawn, for the sampler and for training alike."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Truncation:
    """A rule that is the same for all tokens; see `nemo_rl.data.types.SamplingParams`.

    Attributes:
        top_p: 1 keeps all.
        top_k: 0 keeps all.
        min_p: 0 keeps all.
    """

    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


WHOLE = Truncation()
"""The whole distribution."""

_FIRST_LOOK = 1024
"""Tokens that nearly always hold all that stay; finding them takes an eighth of the time of a sort (V = 49152, CPU)."""


def truncated_logits(
    logits: Tensor,
    *,
    top_p: Tensor | float,
    top_k: Tensor | int,
    min_p: Tensor | float,
    keep: Tensor | None = None,
) -> Tensor:
    """Set the logits that top-k, then top-p, then min-p remove to -inf.

    The best token always stays, and tokens as likely as the last that stays stay with it. Which tokens stay is a
    constant to autograd.

    Args:
        logits: [n, V], already divided by the temperature.
        top_p: of every row, or [n, 1].
        top_k: of every row, or int64 [n, 1].
        min_p: of every row, or [n, 1].
        keep: int64 [n], a token of each row that stays whatever the rules say.
    """
    with torch.no_grad():
        num_tokens = logits.shape[-1]
        most = int(top_k.max()) if isinstance(top_k, Tensor) else top_k
        lowest, found = _lowest_kept(logits, top_p, top_k, min_p, min(num_tokens, max(most, _FIRST_LOOK)))
        if not found:
            lowest, _ = _lowest_kept(logits, top_p, top_k, min_p, num_tokens)
        removed = logits < lowest
        if keep is not None:
            removed.scatter_(-1, keep[:, None], False)
    return logits.masked_fill(removed, -torch.inf)


def _lowest_kept(
    logits: Tensor, top_p: Tensor | float, top_k: Tensor | int, min_p: Tensor | float, width: int
) -> tuple[Tensor, bool]:
    """Find the lowest logit [n, 1] that stays among the `width` largest, at least top_k; and whether it is the last."""
    ordered = logits.topk(width, dim=-1).values
    limit = torch.as_tensor(top_k, device=logits.device)
    allowed = (limit == 0) | (torch.arange(width, device=logits.device) < limit)
    within = ordered.masked_fill(~allowed, -torch.inf)
    total = torch.where(limit == 0, logits.logsumexp(-1, keepdim=True), within.logsumexp(-1, keepdim=True))
    probability = (within - total).exp()
    before = probability.cumsum(-1) - probability
    kept = allowed & ((before < top_p) | torch.as_tensor(top_p >= 1, device=logits.device))
    kept &= probability >= min_p * probability[:, :1]
    last = kept.sum(-1, keepdim=True).clamp(min=1) - 1
    return ordered.gather(-1, last), width == logits.shape[-1] or not kept[:, -1].any()
