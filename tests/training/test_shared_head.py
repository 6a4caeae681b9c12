"""A step and a teacher whose LM head lies on several ranks are those of one process."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_rl.data.batch import TokenBatch
from nemo_rl.distributed.vocabulary import ShardedVocabulary
from nemo_rl.interfaces import Objective
from nemo_rl.metrics import scalars
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.objectives.distillation import DistillationObjective
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.training.step import Scorer, train_step
from nemo_rl.training.teacher import topk_logprobs
from ranks import run_ranks
from tiny_batches import rollout_batch
from tiny_models import tiny_model

OBJECTIVES: dict[str, Objective] = {
    "policy": ClippedPolicyObjective(kl_weight=0.1),
    "distillation": DistillationObjective(forward_weight=0.4, zero_outside_topk=True, chunk_size=16),
}


def run(model: CausalLM, batch: TokenBatch) -> dict[str, Any]:
    """A teacher's answer, and of a step with each objective the metrics and the gradients of trunk and head."""
    scorer = Scorer(model, temperature=0.8, chunk_size=16)
    found: dict[str, Any] = {"teacher": topk_logprobs(scorer, batch, 5, max_tokens=70, vocab_size=100)}
    for name, objective in OBJECTIVES.items():
        model.module.zero_grad()
        model.head.zero_grad()
        metrics = scalars(train_step(scorer, batch, objective, max_tokens=70, update=dict))
        trunk = [parameter.grad for parameter in model.trunk.parameters()]
        found[name] = metrics, torch.cat([g.flatten() for g in trunk]), model.head.weight.grad.clone()
    return found


def shared(rank: int, batch: TokenBatch) -> dict[str, Any]:
    assert dist.group.WORLD is not None
    model = CausalLM.wrap(tiny_model("qwen3"))
    vocabulary = ShardedVocabulary(dist.group.WORLD, len(model.head.weight))
    head = nn.Linear(model.head.in_features, vocabulary.size, bias=False)
    head.weight.data.copy_(model.head.weight[vocabulary.start :][: vocabulary.size])
    return run(replace(model, head=head, vocabulary=vocabulary), batch)


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_a_head_over_three_ranks_trains_and_teaches_as_one() -> None:
    plain = tiny_model("qwen3")
    batch = rollout_batch(plain, temperature=0.8)
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(batch.num_tokens, 128, generator=generator).topk(4).indices
    teacher = torch.randn(batch.num_tokens, 4, generator=generator).log_softmax(-1)
    batch = batch.with_columns(teacher_ids=ids.int(), teacher_logprobs=teacher)
    expected = run(CausalLM.wrap(plain), batch)
    results = run_ranks(shared, 3, batch)
    for found in results:
        assert_close(found["teacher"][0], expected["teacher"][0])
        assert found["teacher"][1].equal(expected["teacher"][1])
    for name in OBJECTIVES:
        metrics, trunk, head = expected[name]
        for found in results:
            assert found[name][0].keys() == metrics.keys()
            assert_close(*(torch.tensor(list(figures.values())) for figures in (found[name][0], metrics)))
            assert_close(found[name][1], trunk)
        assert [len(found[name][2]) for found in results] == [43, 43, 42]
        assert_close(torch.cat([found[name][2] for found in results]), head)
