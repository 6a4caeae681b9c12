"""Losses on preferences: between two answers to one prompt (pairs), or for single answers judged good or bad.

The losses are functions of whole sequences, a training step adds up tokens. An objective of this file therefore gives
*every* token of a sequence the loss of its sequence (a pair's loss to both of its sequences), to be weighed with
`loss_weights(..., reduction="sequence_mean")`: the weights of a sequence add up to 1 / number of sequences, so the
step's sum is the mean over the pairs (or sequences) of the global batch, whichever micro-batch they are in.

Sequence columns: `chosen` bool [B] marks the preferred (desirable) answers. A pair is a group of one chosen and one
rejected sequence, which must stand in one micro-batch.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import ConfigError, DataError
from nemo_rl.metrics import Metrics
from nemo_rl.objectives.jagged import sequence_column, sequence_means, sequence_sums, token_column
from nemo_rl.objectives.logprobs import Reads, TokenOutputs
from nemo_rl.objectives.policy import token_means
from nemo_rl.objectives.value import ScalarOutputs

type PairLoss = Literal["dpo", "ipo", "hinge", "simpo", "orpo"]


def dpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)) for every pair (Rafailov et al., "Direct Preference Optimization", 2023).

    Args:
        chosen: [P], log-probability ratios policy - reference of the chosen answers, summed or averaged over tokens.
        rejected: [P], of the rejected ones.
        beta: how strongly the policy is held to the reference.
        label_smoothing: probability that a pair is labelled the wrong way round; that share of the loss is the swapped
            pair's (cDPO; Mitchell, "A note on DPO with noisy preferences", 2023).

    Returns:
        [P].
    """
    logits = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """(chosen - rejected - 1 / (2 beta))^2 for every pair (Azar et al., "A General Theoretical Paradigm", 2023).

    The margin does not depend on length, so averaged log-probability ratios [P] are the usual choice.
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def hinge_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """max(0, 1 - beta (chosen - rejected)) for every pair [P] of log-probability ratios.

    SLiC's calibration (Zhao et al., 2023) normalised as by Liu et al., "Statistical Rejection Sampling", 2023.
    """
    return torch.relu(1 - beta * (chosen - rejected))


def simpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 2.0, margin: float = 1.0) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - margin) for every pair (Meng et al., "SimPO", 2024).

    Args:
        chosen: [P], log-probabilities of the chosen answers averaged over their tokens; there is no reference.
        rejected: [P], of the rejected ones.
        beta: scale of the reward.
        margin: gamma, by how much the chosen reward should exceed the rejected one.

    Returns:
        [P].
    """
    return -F.logsigmoid(beta * (chosen - rejected) - margin)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(log(odds(chosen) / odds(rejected))), odds(p) = p / (1 - p), for every pair (Hong et al., 2024).

    ORPO ("Monolithic Preference Optimization") is the chosen answer's NLL plus a multiple of it.

    Args:
        chosen: [P], log-probabilities of the chosen answers averaged over their tokens: log p.
        rejected: [P], of the rejected ones.

    Returns:
        [P].
    """
    return -F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) for log p below 0; held a rounding error away from certainty, where it is infinite."""
    logprob = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    return logprob - torch.log(-torch.expm1(logprob))


def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    reference_kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Judge single answers, w (1 - sigmoid(+-beta (log_ratio - z))), + for desirable (Ethayarajh et al., "KTO", 2024).

    Args:
        log_ratios: [B], log-probability ratios policy - reference of single answers.
        desirable: bool [B].
        reference_kl: z, [] or [B], the policy's distance from the reference (see `kto_reference_kl`); a constant.
        beta: how strongly the policy is held to the reference.
        desirable_weight: w of desirable answers.
        undesirable_weight: w of undesirable ones.

    Returns:
        [B].
    """
    gain = beta * (log_ratios - reference_kl.detach())
    return torch.where(
        desirable, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain)
    )  # 1 - sigmoid(x) = sigmoid(-x), without the cancellation


def kto_reference_kl(mismatched_log_ratios: Tensor) -> Tensor:
    """Estimate KTO's reference point max(0, mean) from prompts paired with answers to other prompts: [B] -> [].

    Take it over the global batch, so that no micro-batch has a point of its own.
    """
    return mismatched_log_ratios.detach().mean().clamp(min=0)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, *, margins: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) for every pair of scores [P] (Bradley and Terry, 1952).

    `margins` [P] asks for a larger distance where annotators were surer (Touvron et al., "Llama 2", 2023).
    """
    return -F.logsigmoid(chosen - rejected - margins)


def centering_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(chosen + rejected)^2 for every pair of scores [P]: it holds to 0 the mean, which the pair loss leaves free.

    Eisenstein et al., "Helping or Herding?", 2023, with a weight of 0.01.
    """
    return (chosen + rejected).square()


@torch.no_grad()
def pair_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Metrics:
    """Average `accuracy` (a tie counts half), `margin`, `chosen_reward` and `rejected_reward` over pairs [P]."""
    margin = chosen_rewards - rejected_rewards
    return token_means(
        {
            "accuracy": (margin.sign() + 1) / 2,
            "margin": margin,
            "chosen_reward": chosen_rewards,
            "rejected_reward": rejected_rewards,
        }
    )


@dataclass(frozen=True, slots=True)
class PreferenceObjective:
    """DPO and its kin on pairs: `preference_weight` times the pair's loss plus `sft_weight` times the chosen's NLL.

    Token columns read: `reference_logprobs` if `needs_reference`. Sequence columns: `chosen`.

    Attributes:
        kind: the loss of a pair; ORPO's own form has an `sft_weight` of 1 and its lambda as `preference_weight`.
        beta: see the losses; scales the rewards that are reported.
        label_smoothing: for dpo, see `dpo_loss`.
        margin: for simpo, see `simpo_loss`.
        average_logprobs: average over tokens instead of adding up; simpo and orpo always do.
        preference_weight: of the pair's loss.
        sft_weight: of the chosen answer's negative log-likelihood.
        sft_average_logprobs: average it over the answer's tokens instead of adding up.
    """

    reads: ClassVar[Reads] = "logprobs"

    kind: PairLoss = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 0.0
    average_logprobs: bool = False
    preference_weight: float = 1.0
    sft_weight: float = 0.0
    sft_average_logprobs: bool = True

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"the preference loss has beta {self.beta}; it must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 0.5, the share at which a "
                "label says nothing"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return self.kind in ("dpo", "ipo", "hinge")

    def __call__(self, outputs: TokenOutputs, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        """Return the loss of each token's pair, float32 [M], and the metrics of the micro-batch."""
        chosen, rejected = pair_indices(tokens)
        policy = outputs.policy_logprobs
        scores = policy - token_column(tokens, "reference_logprobs") if self.needs_reference else policy
        averaged = self.average_logprobs or not self.needs_reference
        per_sequence = (sequence_means if averaged else sequence_sums)(scores, tokens.cu_seqlens)
        pair_loss = self._pair_loss(per_sequence[chosen], per_sequence[rejected])
        means = {"preference_loss": pair_loss}
        loss = self.preference_weight * pair_loss
        if self.sft_weight > 0:
            reduce = sequence_means if self.sft_average_logprobs else sequence_sums
            nll = -reduce(policy, tokens.cu_seqlens)[chosen]
            loss = loss + self.sft_weight * nll
            means["sft_loss"] = nll
        rewards = self.beta * per_sequence
        metrics = token_means(means) | pair_metrics(rewards[chosen], rewards[rejected])
        return _loss_of_pairs(loss, chosen, rejected, tokens), metrics

    def _pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        match self.kind:
            case "dpo":
                return dpo_loss(chosen, rejected, beta=self.beta, label_smoothing=self.label_smoothing)
            case "ipo":
                return ipo_loss(chosen, rejected, beta=self.beta)
            case "hinge":
                return hinge_loss(chosen, rejected, beta=self.beta)
            case "simpo":
                return simpo_loss(chosen, rejected, beta=self.beta, margin=self.margin)
            case "orpo":
                return odds_ratio_loss(chosen, rejected)


@dataclass(frozen=True, slots=True)
class KTOObjective:
    """KTO on single answers.

    Token columns read: `reference_logprobs`. Sequence columns: `chosen` (desirable) and `reference_kl` float32, the
    reference point of the global batch, equal for all sequences.

    Attributes:
        beta: see `kto_loss`.
        desirable_weight: see `kto_loss`.
        undesirable_weight: see `kto_loss`.
    """

    reads: ClassVar[Reads] = "logprobs"

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __call__(self, outputs: TokenOutputs, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        """Return the loss of each token's sequence, float32 [M], and the metrics of the micro-batch."""
        desirable, reference_kl = sequence_column(tokens, "chosen"), sequence_column(tokens, "reference_kl")
        ratios = outputs.policy_logprobs - token_column(tokens, "reference_logprobs")
        log_ratios = sequence_sums(ratios, tokens.cu_seqlens)
        loss = kto_loss(
            log_ratios,
            desirable,
            reference_kl,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        metrics = token_means({"preference_loss": loss, "reference_kl": reference_kl})
        for name, group in (("chosen_reward", desirable), ("rejected_reward", ~desirable)):
            metrics |= token_means({name: self.beta * log_ratios[group]})
        return tokens.per_token(loss), metrics


@dataclass(frozen=True, slots=True)
class RewardModelObjective:
    """Bradley-Terry loss of a scalar head; the score of a sequence is that of its last loss token.

    Sequence columns read: `chosen`; `margins` float32, the chosen sequence's, if there is a `margin_scale`.

    Attributes:
        margin_scale: times the margin of a pair is the distance asked for, see `bradley_terry_loss`.
        centering_weight: of `centering_penalty`.
    """

    reads: ClassVar[Reads] = "values"

    margin_scale: float = 0.0
    centering_weight: float = 0.0

    def __call__(self, outputs: ScalarOutputs, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        """Return the loss of each token's pair, float32 [M], and the metrics of the micro-batch."""
        chosen, rejected = pair_indices(tokens)
        scores = outputs.values[tokens.cu_seqlens[1:] - 1]
        better, worse = scores[chosen], scores[rejected]
        margins = self.margin_scale * sequence_column(tokens, "margins")[chosen] if self.margin_scale else 0.0
        loss = bradley_terry_loss(better, worse, margins=margins)
        metrics = token_means({"preference_loss": loss}) | pair_metrics(better, worse)
        if self.centering_weight:
            loss = loss + self.centering_weight * centering_penalty(better, worse)
        return _loss_of_pairs(loss, chosen, rejected, tokens), metrics


def pair_indices(tokens: TokenBatch) -> tuple[Tensor, Tensor]:
    """Return where the chosen and the rejected sequence of every pair stand: int64 [P] each, pair by pair.

    Raises:
        DataError: a group is not one chosen and one rejected sequence with at least one loss token each.
    """
    preferred = sequence_column(tokens, "chosen")
    chosen, rejected = preferred.nonzero()[:, 0], (~preferred).nonzero()[:, 0]
    group = tokens.group_ids
    whole = torch.equal(group[chosen], group[rejected]) and len(group[chosen].unique()) == len(chosen)
    if not whole or not tokens.lengths.all():
        raise DataError(
            f"{tokens.num_sequences} sequences in {len(group.unique())} groups are not whole pairs of one chosen "
            "and one rejected answer with loss tokens; drop pairs with an empty answer, and keep pairs whole when "
            "batches are cut"
        )
    return chosen, rejected


def _loss_of_pairs(loss: Tensor, chosen: Tensor, rejected: Tensor, tokens: TokenBatch) -> Tensor:
    """Give both sequences of every pair, and all of their tokens, the pair's loss: [P] -> [M]."""
    per_sequence = loss.new_zeros(tokens.num_sequences)
    per_sequence = per_sequence.index_copy(0, chosen, loss).index_copy(0, rejected, loss)
    return tokens.per_token(per_sequence)
