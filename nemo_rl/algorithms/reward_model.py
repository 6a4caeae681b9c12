"""Reward models, one visible loop: the better answer of a pair is to score higher (Bradley and Terry, 1952)."""

from collections.abc import Sequence

from nemo_rl.algorithms.run import Run
from nemo_rl.config.schema.reward_model import RewardModelLoopConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.supervised import Supervision
from nemo_rl.data.types import ChatPair, Preference, RolloutGroup
from nemo_rl.metrics import Metrics, Sum, prefixed
from nemo_rl.objectives.preference import RewardModelObjective
from nemo_rl.objectives.weights import loss_weights
from nemo_rl.workers.handles import Policy


def train_rm(
    run: Run, policy: Policy, data: Supervision[ChatPair, Preference], objective: RewardModelObjective
) -> None:
    """Train until the run ends: its steps or epochs are used up, its time is over or it is interrupted.

    A step: draw pairs -> one batch in which every pair weighs the same -> one optimizer step. The head starts at zero,
    so the first loss is ln 2 and the first step moves the head alone.
    """
    loader = data.loader

    def validate() -> tuple[Metrics, list[RolloutGroup]]:
        return policy.evaluate(rm_batch(data.validation), objective), []

    run.begin(validate)
    for step in run.steps(loader):
        batch = rm_batch(next(loader))
        with run.phase("train"):
            metrics = policy.train(batch, objective)
        metrics |= {"optimizer_steps": Sum(1), "num_skipped": Sum(loader.num_skipped)}
        run.end_step(step, prefixed("train", metrics))
        run.keep(step, policy, loader, validate=validate)


def rm_batch(pairs: Sequence[Preference]) -> TokenBatch:
    """Lay pairs, encoded by a `ScoreEncoder`, side by side; each weighs the same."""
    batch = TokenBatch.from_preferences(pairs)
    weights = loss_weights(batch.token_columns["loss_mask"], batch.cu_seqlens, reduction="sequence_mean")
    return batch.with_columns(loss_weights=weights)


def rm_objective(config: RewardModelLoopConfig) -> RewardModelObjective:
    """Build the objective of the `rm` section."""
    return RewardModelObjective(margin_scale=config.margin_scale, centering_weight=config.centering_weight)
