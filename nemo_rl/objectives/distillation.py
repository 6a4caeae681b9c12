"""Distillation: how far the student's next-token distributions are from the teacher's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemo_rl.errors import DataError

_FLOOR = -100.0
"""Log-probability of what the teacher rules out: finite, so that reverse KL punishes it without being infinite."""


@dataclass(frozen=True, slots=True)
class DistributionOutputs:
    """Whole next-token distributions at the M loss tokens of a micro-batch, as `chunked_distillation_loss` takes them.

    Attributes:
        hidden: [M, H] with gradient; row m predicts token m.
        head: [m, H] -> logits float32 [m, V].
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]


def distillation_loss(
    student_logits: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor | None = None,
    *,
    forward_weight: float = 1.0,
    zero_outside_topk: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """Mix both divergences at every token, w KL(teacher || student) + (1 - w) KL(student || teacher).

    Forward KL makes the student cover the teacher (Hinton et al., 2015), reverse KL makes it choose one of its modes
    (Gu et al., "MiniLLM", 2024); on the student's own samples: Agarwal et al., "On-Policy Distillation", 2024.

    Args:
        student_logits: [M, V], with gradient.
        teacher_logprobs: [M, k] of `teacher_ids`, or [M, V] of the whole vocabulary; renormalised over what is given.
        teacher_ids: int64 [M, k], distinct tokens; None for the whole vocabulary.
        forward_weight: w; 1 is forward KL, 0 reverse KL, between them a mixture.
        zero_outside_topk: the student keeps its whole vocabulary and the teacher's other tokens have log-probability
            -100, so mass that the student puts there costs; if not, both are renormalised over the k tokens.
        temperature: divides the student's logits.

    Returns:
        [M], float32 (float64 for float64 logits).

    Raises:
        DataError: the teacher's and the student's vocabulary differ.
    """
    logits = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32)) / temperature
    teacher = teacher_logprobs.to(logits.dtype).log_softmax(-1).clamp(min=_FLOOR)
    if teacher_ids is None:
        if teacher.shape != logits.shape:
            raise DataError(
                f"the teacher scores {teacher.shape[-1]} tokens and the student {logits.shape[-1]}; distil between "
                "models of one tokenizer and vocabulary size"
            )
    elif zero_outside_topk:
        teacher = torch.full_like(logits, _FLOOR, requires_grad=False).scatter(1, teacher_ids, teacher)
    else:
        logits = logits.gather(1, teacher_ids)
    student = logits.log_softmax(-1).clamp(min=_FLOOR)
    loss = student.new_zeros(len(student))
    if forward_weight != 0:
        loss = loss + forward_weight * (teacher.exp() * (teacher - student)).sum(-1)
    if forward_weight != 1:
        loss = loss + (1 - forward_weight) * (student.exp() * (student - teacher)).sum(-1)
    return loss


def chunked_distillation_loss(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    teacher_logprobs: Tensor,
    teacher_ids: Tensor | None = None,
    *,
    forward_weight: float = 1.0,
    zero_outside_topk: bool = False,
    temperature: float = 1.0,
    chunk_size: int = 256,
) -> Tensor:
    """`distillation_loss` of hidden states, with the logits of `chunk_size` tokens at a time.

    Neither pass holds all logits: the backward pass computes each chunk's again.

    Args:
        hidden: [M, H], with gradient; row m predicts token m (see `logprobs.select_hidden`).
        head: [m, H] -> logits [m, V], such as `CausalLM.logits`; its own parameters receive their gradient.
        teacher_logprobs: see `distillation_loss`.
        teacher_ids: see `distillation_loss`.
        forward_weight: see `distillation_loss`.
        zero_outside_topk: see `distillation_loss`.
        temperature: see `distillation_loss`.
        chunk_size: tokens; a few tensors of as many rows of logits [V] exist at a time.

    Returns:
        [M].
    """

    def score(rows: Tensor, logprobs: Tensor, ids: Tensor | None) -> Tensor:
        return distillation_loss(
            head(rows),
            logprobs,
            ids,
            forward_weight=forward_weight,
            zero_outside_topk=zero_outside_topk,
            temperature=temperature,
        )

    rows, logprobs = hidden.split(chunk_size), teacher_logprobs.split(chunk_size)
    ids = [None] * len(rows) if teacher_ids is None else teacher_ids.split(chunk_size)
    return torch.cat(
        [
            cast(Tensor, checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False))
            for chunk in zip(rows, logprobs, ids, strict=True)
        ]
    )
