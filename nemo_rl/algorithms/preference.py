"""Preference training, one visible loop: DPO and its kin on pairs of answers, KTO on judged ones."""

from collections.abc import Callable, Sequence
from functools import partial

from nemo_rl.algorithms.run import Run
from nemo_rl.config.schema.preference import PreferenceLoopConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.examples import mismatched
from nemo_rl.data.supervised import Supervision
from nemo_rl.data.types import Chat, ChatPair, Example, Preference, RolloutGroup
from nemo_rl.errors import DataError
from nemo_rl.interfaces import Objective
from nemo_rl.metrics import Metrics, Sum, prefixed
from nemo_rl.objectives.jagged import sequence_sums
from nemo_rl.objectives.preference import KTOObjective, PreferenceObjective, kto_reference_kl
from nemo_rl.objectives.weights import loss_weights
from nemo_rl.workers.handles import Policy


def train_on_pairs(
    run: Run, policy: Policy, data: Supervision[ChatPair, Preference], objective: PreferenceObjective
) -> None:
    """Train on pairs until the run ends; see `_train`."""
    _train(run, policy, data, objective, partial(pair_batch, policy, with_reference=objective.needs_reference))


def train_on_judged(run: Run, policy: Policy, data: Supervision[Chat, Example], objective: KTOObjective) -> None:
    """Train on judged answers until the run ends; see `_train`."""
    _train(run, policy, data, objective, partial(judged_batch, policy))


def _train[Item, Ready](
    run: Run,
    policy: Policy,
    data: Supervision[Item, Ready],
    objective: Objective,
    batch_of: Callable[[Sequence[Ready]], TokenBatch],
) -> None:
    """Train until the run ends: its steps or epochs are used up, its time is over or it is interrupted.

    A step: draw records -> one batch in which every record weighs the same -> reference log-probabilities, if the loss
    needs them -> one optimizer step.
    """
    loader = data.loader

    def validate() -> tuple[Metrics, list[RolloutGroup]]:
        return policy.evaluate(batch_of(data.validation), objective), []

    run.begin(validate)
    for step in run.steps(loader):
        records = next(loader)
        with run.phase("logprobs"):
            batch = batch_of(records)
        with run.phase("train"):
            metrics = policy.train(batch, objective)
        metrics |= {"optimizer_steps": Sum(1), "num_skipped": Sum(loader.num_skipped)}
        run.end_step(step, prefixed("train", metrics))
        run.keep(step, policy, loader, validate=validate)


def pair_batch(policy: Policy, pairs: Sequence[Preference], *, with_reference: bool) -> TokenBatch:
    """Lay pairs side by side as an objective on pairs takes them."""
    batch = _weighted(TokenBatch.from_preferences(pairs))
    return _compared(policy, batch) if with_reference else batch


def judged_batch(policy: Policy, examples: Sequence[Example]) -> TokenBatch:
    """Lay judged answers side by side as KTO takes them, with the reference point of the whole batch.

    Raises:
        DataError: the answers are not judged, or there is only one.
    """
    batch = _weighted(TokenBatch.from_examples(examples))
    if "chosen" not in batch.sequence_columns:
        raise DataError(
            "kto learns from answers that are judged good or bad, and these records have no label; give the data a "
            "format of type judged, or choose another dpo.preference_loss"
        )
    others = _compared(policy, TokenBatch.from_examples(mismatched(examples)))
    log_ratios = policy.logprobs(others) - others.token_columns["reference_logprobs"]
    point = kto_reference_kl(sequence_sums(log_ratios, others.cu_seqlens))
    return _compared(policy, batch).with_sequence_columns(reference_kl=point.repeat(batch.num_sequences))


def preference_objective(config: PreferenceLoopConfig) -> PreferenceObjective | KTOObjective:
    """Build the objective of the `dpo` section."""
    beta, kind = config.reference_policy_kl_penalty, config.preference_loss
    if kind == "kto":
        return KTOObjective(beta, config.desirable_weight, config.undesirable_weight)
    return PreferenceObjective(
        kind=kind,
        beta=beta,
        label_smoothing=config.label_smoothing,
        margin=config.simpo_margin,
        average_logprobs=config.preference_average_log_probs,
        preference_weight=config.preference_loss_weight,
        sft_weight=config.sft_loss_weight,
        sft_average_logprobs=config.sft_average_log_probs,
    )


def _weighted(batch: TokenBatch) -> TokenBatch:
    """Every sequence weighs the same, so that a loss of pairs is their mean."""
    weights = loss_weights(batch.token_columns["loss_mask"], batch.cu_seqlens, reduction="sequence_mean")
    return batch.with_columns(loss_weights=weights)


def _compared(policy: Policy, batch: TokenBatch) -> TokenBatch:
    with policy.reference():
        return batch.with_columns(reference_logprobs=policy.logprobs(batch))
