"""A training step as one writes it by hand over a Transformers model: what the library's step is compared with."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from nemo_rl.data.batch import TokenBatch
from nemo_rl.objectives.weights import loss_weights


def equal_sequences(num_sequences: int, length: int, vocabulary: int) -> TokenBatch:
    """Random sequences of one length, so that rows need no padding, with loss on every token but the first."""
    tokens = torch.randint(vocabulary, (num_sequences * length,), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(length).repeat(num_sequences) > 0
    cu_seqlens = torch.arange(num_sequences + 1) * length
    columns = {"loss_mask": mask, "loss_weights": loss_weights(mask, cu_seqlens)}
    return TokenBatch(tokens, cu_seqlens, torch.arange(num_sequences), columns)


def rows(batch: TokenBatch, per_micro_batch: int, device: torch.device | str) -> list[Tensor]:
    """The same sequences as micro-batches of rows, int64 [b, length] each, on the device."""
    return list(batch.token_ids.view(batch.num_sequences, -1).to(device).split(per_micro_batch))


def bare_backward(model: PreTrainedModel, parts: Sequence[Tensor]) -> Tensor:
    """Add the gradients of the mean negative log-likelihood to the model; returns it, on the device."""
    num_targets = sum(part[:, 1:].numel() for part in parts)
    total = torch.zeros((), device=model.device)
    for part in parts:
        logits = model(input_ids=part[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum") / num_targets
        loss.backward()
        total += loss.detach()
    return total
