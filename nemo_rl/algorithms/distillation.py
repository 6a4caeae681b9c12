"""Distillation, two visible loops: teachers score what the student samples, or what a data set says."""

from collections.abc import Sequence

from nemo_rl.algorithms.run import Run
from nemo_rl.algorithms.sampling import RolloutSource
from nemo_rl.algorithms.sft import sft_batch
from nemo_rl.algorithms.teachers import Teachers
from nemo_rl.config.schema.distillation import DistillationConfig, TaughtRunConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.loader import TaskLoader
from nemo_rl.data.supervised import Supervision
from nemo_rl.data.types import Chat, Example, RolloutGroup
from nemo_rl.metrics import Metrics, Sum, merge, prefixed
from nemo_rl.objectives.distillation import DistillationObjective
from nemo_rl.objectives.weights import loss_weights
from nemo_rl.workers.handles import Policy


def train_distillation(
    config: DistillationConfig,
    run: Run,
    policy: Policy,
    source: RolloutSource,
    loader: TaskLoader,
    teachers: Teachers,
    objective: DistillationObjective,
) -> None:
    """On-policy (Agarwal et al., 2024): train until the run ends, its steps or epochs used up or its time over.

    A step: the student answers -> minibatches in which every sampled token weighs the same -> the teachers' next-token
    distributions at these tokens -> one optimizer step per minibatch -> publish the weights. Rewards are logged only.
    A validation compares the distributions on the student's greedy answers, and has these judged.
    """

    def validate() -> tuple[Metrics, list[RolloutGroup]]:
        metrics, groups = source.validate()
        return metrics | policy.evaluate(teachers.score(_weighted(_answers(groups, teachers))), objective), groups

    run.begin(validate)
    for step in run.steps(loader):
        with run.phase("generate"):
            collected = source.groups(next(loader), step)
        batch = _answers(collected.groups, teachers)
        parts = [_weighted(part) for part in batch.minibatches(config.policy.train_global_batch_size)]
        with run.phase("logprobs"):
            parts = [teachers.score(part) for part in parts]
        with run.phase("train"):
            trained = merge(policy.train(part, objective) for part in parts)
            policy.publish(step)
        sampled = Sum(float(batch.token_columns["loss_mask"].sum()))
        metrics = collected.metrics | trained | {"optimizer_steps": Sum(len(parts)), "tokens_sampled": sampled}
        metrics |= {"tokens_collected": Sum(batch.num_tokens), "num_skipped": Sum(loader.num_skipped)}
        run.end_step(step, prefixed("train", metrics), collected)
        run.keep(step, policy, loader, validate=validate)


def train_off_policy_distillation(
    run: Run,
    policy: Policy,
    data: Supervision[Chat, Example],
    teachers: Teachers,
    objective: DistillationObjective,
) -> None:
    """Off-policy: train until the run ends.

    A step: draw conversations -> one batch in which every token to learn weighs the same -> the teacher's next-token
    distributions at these tokens -> one optimizer step.
    """
    loader = data.loader

    def scored(examples: Sequence[Example]) -> TokenBatch:
        return teachers.score(sft_batch(examples))

    def validate() -> tuple[Metrics, list[RolloutGroup]]:
        return policy.evaluate(scored(data.validation), objective), []

    run.begin(validate)
    for step in run.steps(loader):
        examples = next(loader)
        with run.phase("logprobs"):
            batch = scored(examples)
        with run.phase("train"):
            metrics = policy.train(batch, objective)
        metrics |= {"optimizer_steps": Sum(1), "num_skipped": Sum(loader.num_skipped)}
        run.end_step(step, prefixed("train", metrics))
        run.keep(step, policy, loader, validate=validate)


def distillation_objective(config: TaughtRunConfig, vocab_size: int) -> DistillationObjective:
    """Build the objective of the `loss_fn` section, over the tokens that student and teachers have."""
    return DistillationObjective(
        forward_weight=config.loss_fn.forward_weight,
        zero_outside_topk=config.loss_fn.zero_outside_topk,
        temperature=config.loss_fn.temperature,
        vocab_size=vocab_size,
        chunk_size=config.policy.logprob_chunk_size or 256,
    )


def _answers(groups: Sequence[RolloutGroup], teachers: Teachers) -> TokenBatch:
    """Lay sampled answers side by side, each with its teacher."""
    environments = [group.task.environment for group in groups for _ in group.rollouts]
    return teachers.assign(TokenBatch.from_rollouts(groups), environments)


def _weighted(batch: TokenBatch) -> TokenBatch:
    return batch.with_columns(loss_weights=loss_weights(batch.token_columns["loss_mask"], batch.cu_seqlens))
