"""Divergences from a teacher: known answers, torch's own KL, top-k both ways, chunks."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import DataError
from nemo_rl.metrics import scalars
from nemo_rl.objectives.distillation import DistillationObjective, DistributionOutputs, distillation_loss
from nemo_rl.objectives.logprobs import LogitHead


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def test_two_coins_worked_out_by_hand() -> None:
    """Teacher (.5, .5), student (.8, .2): .5 ln(.5/.8) + .5 ln(.5/.2) = .22314, the other way .19274."""
    student, teacher = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert distillation_loss(student, teacher).item() == pytest.approx(0.22314, abs=1e-5)
    assert distillation_loss(student, teacher, forward_weight=0.0).item() == pytest.approx(0.19274, abs=1e-5)
    mixed = distillation_loss(student, teacher, forward_weight=0.25).item()
    assert mixed == pytest.approx(0.25 * 0.22314 + 0.75 * 0.19274, abs=1e-5)


@pytest.mark.parametrize("forward_weight", [1.0, 0.0, 0.3])
def test_whole_vocabulary_against_torch(forward_weight: float) -> None:
    student, teacher = draw(5, 9, seed=1).requires_grad_(), draw(5, 9, seed=2).log_softmax(-1)
    ours = distillation_loss(student, teacher, forward_weight=forward_weight, temperature=0.7)
    q = (student / 0.7).log_softmax(-1)
    forward = F.kl_div(q, teacher, reduction="none", log_target=True).sum(-1)
    reverse = F.kl_div(teacher, q, reduction="none", log_target=True).sum(-1)
    theirs = forward_weight * forward + (1 - forward_weight) * reverse
    torch.testing.assert_close(ours, theirs)
    weights = draw(5, seed=3)
    torch.testing.assert_close(
        torch.autograd.grad((weights * ours).sum(), student), torch.autograd.grad((weights * theirs).sum(), student)
    )


@pytest.mark.parametrize("forward_weight", [1.0, 0.0, 0.3])
def test_top_k_renormalises_both_or_keeps_the_students_vocabulary(forward_weight: float) -> None:
    student, whole = draw(5, 9, seed=1), draw(5, 9, seed=2).log_softmax(-1)
    top, ids = whole.topk(3)
    p = top.exp() / top.exp().sum(-1, keepdim=True)
    q = student.softmax(-1).gather(1, ids)

    ours = distillation_loss(student, top, ids, forward_weight=forward_weight)
    renormalised = q / q.sum(-1, keepdim=True)
    torch.testing.assert_close(ours, forward_weight * kl(p, renormalised) + (1 - forward_weight) * kl(renormalised, p))

    kept = distillation_loss(student, top, ids, forward_weight=forward_weight, zero_outside_topk=True)
    rest = student.softmax(-1).scatter(1, ids, 0.0)
    outside = (torch.xlogy(rest, rest) + 100 * rest).sum(-1)
    reverse = (q * (q / p).log()).sum(-1) + outside
    torch.testing.assert_close(kept, forward_weight * kl(p, q) + (1 - forward_weight) * reverse)


@settings(deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(1, 7), forward_weight=st.floats(0, 1), outside=st.booleans())
def test_never_negative_and_zero_only_for_the_teacher_itself(
    seed: int, k: int, forward_weight: float, outside: bool
) -> None:
    student, teacher = draw(4, 7, seed=seed), draw(4, 7, seed=seed + 1).log_softmax(-1)
    top, ids = teacher.topk(k)
    loss = distillation_loss(student, top, ids, forward_weight=forward_weight, zero_outside_topk=outside)
    assert (loss > -1e-12).all()
    itself = distillation_loss(teacher, top, ids, forward_weight=forward_weight)
    torch.testing.assert_close(itself, torch.zeros_like(itself))


def test_tokens_that_cannot_be_sampled_do_not_make_it_infinite() -> None:
    student = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    teacher = torch.tensor([[0.0, -torch.inf, 0.0]]).log_softmax(-1)
    loss = distillation_loss(student, teacher, forward_weight=0.5)
    assert loss.isfinite() and torch.autograd.grad(loss.sum(), student)[0].isfinite().all()


def batch_of(**columns: Tensor) -> TokenBatch:
    """Two sequences of 4 and 6 loss tokens, each with a teacher of its own."""
    return TokenBatch(
        torch.zeros(10, dtype=torch.int64),
        torch.tensor([0, 4, 10]),
        torch.arange(2),
        columns,
        {"teacher": torch.tensor([1, 0])},
    )


@pytest.mark.parametrize("vocab_size", [13, 11])
@pytest.mark.parametrize("top_k", [None, 4])
def test_chunks_teachers_and_padding_change_neither_values_nor_gradients(top_k: int | None, vocab_size: int) -> None:
    head = nn.Linear(6, 13).double()
    hidden, given = draw(10, 6, seed=1).requires_grad_(), draw(10, 5, seed=2)
    teachers = (LogitHead(draw(13, 5, seed=4)), LogitHead(draw(15, 4, seed=5)))  # one narrower, with more padding
    scores = torch.cat([teachers[1](given[:4, :4])[:, :13], teachers[0](given[4:])])
    logprobs, ids = (scores[:, :vocab_size] / 0.8).log_softmax(-1), None
    columns = {"teacher_hidden": given}
    if top_k is not None:
        logprobs, ids = logprobs.topk(top_k)
        columns = {"teacher_logprobs": logprobs, "teacher_ids": ids.int()}
    objective = DistillationObjective(0.4, top_k is not None, 0.8, vocab_size, chunk_size=3)
    whole = distillation_loss(
        head(hidden)[:, :vocab_size],
        logprobs,
        ids,
        forward_weight=0.4,
        zero_outside_topk=top_k is not None,
        temperature=0.8,
    )
    chunked, metrics = objective(DistributionOutputs(hidden, head, teachers), batch_of(**columns))
    weights, results = draw(10, seed=3), []
    for loss in (whole, chunked):
        results.append([loss, *torch.autograd.grad((weights * loss).sum(), (hidden, head.weight, head.bias))])
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)
    figures = scalars(metrics)
    mixed = 0.4 * figures["forward_kl"] + 0.6 * figures["reverse_kl"]
    assert mixed == pytest.approx(float(whole.detach().mean()), rel=1e-5)
    if top_k is not None:
        assert figures["teacher_topk_mass"] == pytest.approx(float(logprobs.exp().sum(-1).mean()))


def test_no_pass_holds_all_logits() -> None:
    """The largest tensor saved for backward stays that of the head."""
    head, hidden = nn.Linear(4, 1000), torch.randn(10, 4, requires_grad=True)
    top, ids = torch.randn(10, 1000).log_softmax(-1).topk(8)
    largest = 0

    def look(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    objective = DistillationObjective(zero_outside_topk=True, chunk_size=2)
    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        loss, _ = objective(DistributionOutputs(hidden, head), batch_of(teacher_logprobs=top, teacher_ids=ids))
    assert loss.requires_grad and largest <= head.weight.numel()


def test_vocabularies_must_agree() -> None:
    with pytest.raises(DataError, match="scores 8 tokens and the student 9"):
        distillation_loss(draw(2, 9, seed=1), draw(2, 8, seed=2))
