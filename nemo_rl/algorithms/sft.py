"""Supervised fine-tuning, one visible loop: make the answers of the data more likely."""

from collections.abc import Sequence

from nemo_rl.algorithms.run import Run
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.supervised import Supervision
from nemo_rl.data.types import Chat, Example, RolloutGroup
from nemo_rl.metrics import Metrics, Sum, prefixed
from nemo_rl.objectives.supervised import SupervisedObjective
from nemo_rl.objectives.weights import loss_weights
from nemo_rl.workers.handles import Policy


def train_sft(run: Run, policy: Policy, data: Supervision[Chat, Example]) -> None:
    """Train until the run ends: its steps or epochs are used up, its time is over or it is interrupted.

    A step: draw conversations -> one batch in which every token to learn weighs the same -> one optimizer step.
    """
    objective, loader = SupervisedObjective(), data.loader

    def validate() -> tuple[Metrics, list[RolloutGroup]]:
        return policy.evaluate(sft_batch(data.validation), objective), []

    run.begin(validate)
    for step in run.steps(loader):
        batch = sft_batch(next(loader))
        with run.phase("train"):
            metrics = policy.train(batch, objective)
        metrics |= {"optimizer_steps": Sum(1), "num_skipped": Sum(loader.num_skipped)}
        run.end_step(step, prefixed("train", metrics))
        run.keep(step, policy, loader, validate=validate)


def sft_batch(examples: Sequence[Example]) -> TokenBatch:
    """Lay conversations side by side; the weights of their tokens to learn are equal and sum to 1."""
    batch = TokenBatch.from_examples(examples)
    return batch.with_columns(loss_weights=loss_weights(batch.token_columns["loss_mask"], batch.cu_seqlens))
