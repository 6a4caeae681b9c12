"""Preference training, one visible loop: DPO and its kin on pairs of answers, KTO on judged ones."""

from collections.abc import Callable, Sequence

from nemo_rl.algorithms.preference_batch import Reference, judged_batch, pair_batch
from nemo_rl.algorithms.run import Run
from nemo_rl.config.schema.preference import DPOConfig, PreferenceLoopConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.supervised import Supervision
from nemo_rl.data.types import Chat, ChatPair, Example, Preference, RolloutGroup
from nemo_rl.interfaces import Objective
from nemo_rl.metrics import Metrics, Sum, prefixed
from nemo_rl.objectives.preference import KTOObjective, PreferenceObjective
from nemo_rl.workers.handles import Policy


def train_on_pairs(
    config: PreferenceLoopConfig,
    run: Run,
    policy: Policy,
    data: Supervision[ChatPair, Preference],
    *,
    objective: PreferenceObjective,
) -> None:
    """Train on pairs until the run ends; see `_train`."""
    reference = Reference(policy, max_bytes=config.reference_cache_mib << 20) if objective.needs_reference else None
    _train(run, policy, data, objective, lambda pairs: pair_batch(pairs, reference))


def train_on_judged(
    config: DPOConfig, run: Run, policy: Policy, data: Supervision[Chat, Example], *, objective: KTOObjective
) -> None:
    """Train on judged answers until the run ends; see `_train`."""
    reference = Reference(policy, max_bytes=config.dpo.reference_cache_mib << 20)
    longest = config.max_sequence_tokens
    _train(run, policy, data, objective, lambda examples: judged_batch(policy, examples, reference, longest))


def _train[Item, Ready](
    run: Run,
    policy: Policy,
    data: Supervision[Item, Ready],
    objective: Objective,
    batch_of: Callable[[Sequence[Ready]], TokenBatch],
) -> None:
    """Train until the run ends: its steps or epochs are used up, its time is over or it is interrupted.

    A step: draw records -> one batch in which every record weighs the same -> reference log-probabilities, if the loss
    needs them and they are not known -> one optimizer step.
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
