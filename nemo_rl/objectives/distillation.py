"""Distillation: how far the student's next-token distributions are from the teacher's."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import DataError
from nemo_rl.metrics import Metrics
from nemo_rl.objectives.logprobs import LogitHead, Reads
from nemo_rl.objectives.policy import token_means

_FLOOR = -100.0
"""Log-probability of what the teacher rules out: finite, so that reverse KL punishes it without being infinite."""


@dataclass(frozen=True, slots=True)
class DistributionOutputs:
    """Whole next-token distributions at the M loss tokens of a micro-batch.

    Attributes:
        hidden: [M, H] with gradient; row m predicts token m.
        head: [m, H] -> logits float32 [m, V].
        teachers: the heads of the models to compare with, where the batch holds these models' hidden states.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    teachers: tuple[LogitHead, ...] = ()


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
    student, teacher = _compared(
        student_logits, teacher_logprobs, teacher_ids, zero_outside_topk=zero_outside_topk, temperature=temperature
    )
    loss = student.new_zeros(len(student))
    if forward_weight != 0:
        loss = loss + forward_weight * _kl(teacher, student)
    if forward_weight != 1:
        loss = loss + (1 - forward_weight) * _kl(student, teacher)
    return loss


def _compared(
    student_logits: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor | None,
    *,
    zero_outside_topk: bool,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's log-distribution over the tokens that the loss compares; see above."""
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
    return logits.log_softmax(-1).clamp(min=_FLOOR), teacher


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-distributions [M, V]: [M]."""
    return (p.exp() * (p - q)).sum(-1)


type _Teacher = Callable[..., tuple[Tensor, Tensor | None]]
"""From what the batch holds of a chunk's teacher to log-probabilities (up to a constant) and ids, or None for all."""


@dataclass(frozen=True, slots=True)
class DistillationObjective:
    """The loss of a student; neither pass holds the logits of more than `chunk_size` tokens, teacher's or student's.

    Reads the columns `teacher_logprobs` [N, k] (of the teacher's whole vocabulary) and `teacher_ids` [N, k]; or, to
    compare whole vocabularies, `teacher_hidden` [N, H] and the sequence column `teacher` [B], which of
    `DistributionOutputs.teachers` turns them into logits.

    Metrics, means over tokens: `forward_kl` and `reverse_kl` as the loss defines them, `student_entropy` (of the whole
    vocabulary), `argmax_agreement` (both find the same token most likely) and, with top-k, `teacher_topk_mass`.

    Attributes:
        forward_weight: see `distillation_loss`.
        zero_outside_topk: see `distillation_loss`.
        temperature: divides the logits of both models (`teacher_logprobs` hold it already).
        vocab_size: the tokens that both models have; further logits of either are padding and left out. None: all.
        chunk_size: tokens whose logits exist at a time.
    """

    reads: ClassVar[Reads] = "distribution"

    forward_weight: float = 1.0
    zero_outside_topk: bool = False
    temperature: float = 1.0
    vocab_size: int | None = None
    chunk_size: int = 256

    def __call__(self, outputs: DistributionOutputs, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        """Return the loss of every loss token, float32 [M], and the metrics of the micro-batch."""
        column = tokens.token_columns
        if "teacher_ids" in column:
            loss, figures = self._chunks(
                outputs.head, _topk, outputs.hidden, column["teacher_logprobs"], column["teacher_ids"]
            )
            return loss, token_means(figures)
        owners = tokens.per_token(tokens.sequence_columns["teacher"])
        order, parts = owners.argsort(stable=True), []
        present, counts = owners[order].unique_consecutive(return_counts=True)
        for index, rows in zip(present.tolist(), order.split(counts.tolist()), strict=True):
            head = outputs.teachers[index]
            given = column["teacher_hidden"][rows, : head.weight.shape[1]]
            parts.append(self._chunks(outputs.head, partial(self._whole, head), outputs.hidden[rows], given))
        losses, figures = zip(*parts, strict=True)
        together = {name: torch.cat([part[name] for part in figures]) for name in figures[0]}
        return torch.cat(losses)[order.argsort()], token_means(together)

    def _chunks(
        self, head: Callable[[Tensor], Tensor], teacher: _Teacher, hidden: Tensor, *given: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [M] with gradient and figures [M] of rows that one teacher scores."""
        compare = partial(self._compare, head, teacher)
        chunks = zip(*(rows.split(self.chunk_size) for rows in (hidden, *given)), strict=True)
        results = [checkpoint(compare, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        losses, figures = zip(*cast(list[tuple[Tensor, dict[str, Tensor]]], results), strict=True)
        return torch.cat(losses), {name: torch.cat([part[name] for part in figures]) for name in figures[0]}

    def _compare(
        self, head: Callable[[Tensor], Tensor], teacher: _Teacher, hidden: Tensor, *given: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            logprobs, ids = teacher(*given)
        logits = head(hidden)[:, : self.vocab_size]
        loss = distillation_loss(
            logits,
            logprobs,
            ids,
            forward_weight=self.forward_weight,
            zero_outside_topk=self.zero_outside_topk,
            temperature=self.temperature,
        )
        return loss, self._figures(logits.detach(), logprobs, ids)

    @torch.no_grad()
    def _figures(self, logits: Tensor, logprobs: Tensor, ids: Tensor | None) -> dict[str, Tensor]:
        student, teacher = _compared(
            logits, logprobs, ids, zero_outside_topk=self.zero_outside_topk, temperature=self.temperature
        )
        best = logprobs.argmax(-1)
        whole = (logits / self.temperature).log_softmax(-1)
        figures = {
            "forward_kl": _kl(teacher, student),
            "reverse_kl": _kl(student, teacher),
            "student_entropy": torch.special.entr(whole.exp()).sum(-1),
            "argmax_agreement": logits.argmax(-1) == (best if ids is None else ids.gather(1, best[:, None])[:, 0]),
        }
        return figures if ids is None else figures | {"teacher_topk_mass": logprobs.exp().sum(-1)}

    def _whole(self, head: LogitHead, hidden: Tensor) -> tuple[Tensor, None]:
        return head(hidden)[:, : self.vocab_size] / self.temperature, None


def _topk(logprobs: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return logprobs, ids.long()
