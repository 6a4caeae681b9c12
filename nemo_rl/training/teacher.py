"""What a model says about tokens that others wrote: whole next-token distributions, in a form that can travel."""

import torch
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.objectives.distillation import DistributionOutputs
from nemo_rl.training.step import Scorer, read_tokens


def topk_logprobs(
    scorer: Scorer, batch: TokenBatch, k: int, *, max_tokens: int, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k most likely tokens at every token that carries loss; whole logits exist for one chunk at a time.

    Args:
        scorer: the model; its temperature divides the logits.
        batch: with a `loss_mask`.
        k: at most the vocabulary.
        max_tokens: budget of a micro-batch in computed tokens.
        vocab_size: leave logits from here on out, from the softmax too; None takes all.

    Returns:
        log-probabilities float32 [N, k], likeliest first, and their token ids int32 [N, k]; 0 where no loss is.
    """
    logprobs = torch.zeros(batch.num_tokens, k)
    ids = torch.zeros(batch.num_tokens, k, dtype=torch.int32)
    for outputs, where in read_tokens(scorer, batch, "distribution", max_tokens=max_tokens):
        assert isinstance(outputs, DistributionOutputs)
        for hidden, rows in zip(outputs.hidden.split(scorer.chunk_size), where.split(scorer.chunk_size), strict=True):
            likeliest, tokens = scorer.topk_logprobs(hidden, k, vocab_size)
            logprobs[rows], ids[rows] = likeliest.cpu(), tokens.int().cpu()
    return logprobs, ids


def last_hidden(scorer: Scorer, batch: TokenBatch, *, max_tokens: int) -> Tensor:
    """[N, H], the hidden states from which the head predicts the tokens that carry loss; 0 elsewhere."""
    found: Tensor | None = None
    for outputs, where in read_tokens(scorer, batch, "distribution", max_tokens=max_tokens):
        assert isinstance(outputs, DistributionOutputs)
        if found is None:
            found = torch.zeros(batch.num_tokens, outputs.hidden.shape[1], dtype=outputs.hidden.dtype)
        found[where] = outputs.hidden.cpu()
    return torch.zeros(batch.num_tokens, 0) if found is None else found
