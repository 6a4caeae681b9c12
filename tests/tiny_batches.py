"""Batches as a GRPO step makes them, and the plainest way to score them."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_rl.data.batch import TokenBatch
from nemo_rl.objectives.weights import loss_weights


def rollout_batch(model: PreTrainedModel, *, temperature: float = 1.0, seed: int = 0) -> TokenBatch:
    """Three groups of three answers with every column a loss can read; one answer stands twice, prompts begin alike.

    The old, rollout and reference log-probabilities lie around those of the model.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> Tensor:
        return torch.randint(3, 128, (length,), generator=generator)

    start, sequences, masks = draw(6), [], []
    for prompt_length in (3, 9, 14):
        prompt = torch.cat([start, draw(prompt_length)])
        answers = [draw(length) for length in (2, 6, 11)]
        answers[1] = answers[0] if prompt_length == 9 else answers[1]
        for answer in answers:
            sequences.append(torch.cat([prompt, answer, draw(2)]))  # the last two tokens are the environment's
            masks.append(torch.cat([torch.zeros(len(prompt)), torch.ones(len(answer)), torch.zeros(2)]).bool())
    mask = torch.cat(masks)
    cu_seqlens = torch.tensor([0] + [len(sequence) for sequence in sequences]).cumsum(0)
    weights = {"loss_mask": mask, "loss_weights": loss_weights(mask, cu_seqlens)}
    batch = TokenBatch(torch.cat(sequences), cu_seqlens, torch.arange(3).repeat_interleave(3), weights)
    with torch.no_grad():
        around = plain_logprobs(model, batch, temperature=temperature)
    noise = torch.randn(4, len(mask), generator=generator)
    return batch.with_columns(
        advantages=noise[0],
        old_logprobs=around + 0.3 * noise[1],
        rollout_logprobs=around + 0.1 * noise[2],
        reference_logprobs=around + 0.5 * noise[3],
    )


def plain_logprobs(model: PreTrainedModel, batch: TokenBatch, *, temperature: float = 1.0) -> Tensor:
    """Every sequence alone through plain Transformers, with gradient: [N], 0 at first tokens."""
    found = []
    for tokens in batch.token_ids.split(batch.lengths.tolist()):
        logprobs = (model(tokens[None]).logits[0, :-1].float() / temperature).log_softmax(-1)
        found += [torch.zeros(1), logprobs.gather(-1, tokens[1:, None])[:, 0]]
    return torch.cat(found)


def plain_policy_loss(logprobs: Tensor, batch: TokenBatch, *, clip: float = 0.2, kl_weight: float = 0.1) -> Tensor:
    """GRPO's loss of a whole batch from the [N] log-probabilities, as the paper writes it."""
    column = batch.token_columns
    ratio = (logprobs - column["old_logprobs"]).exp()
    surrogate = torch.min(ratio * column["advantages"], ratio.clamp(1 - clip, 1 + clip) * column["advantages"])
    difference = column["reference_logprobs"] - logprobs
    loss = -surrogate + kl_weight * (difference.exp() - difference - 1)
    return loss[column["loss_mask"]].sum() / column["loss_mask"].sum()
