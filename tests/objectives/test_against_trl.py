"""The same numbers as TRL: values and gradients of our objectives on jagged batches against its padded trainers.

TRL's losses live in trainer methods; they run here on a stand-in with the few attributes that they read, in float64.
"""

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

from nemo_rl.data.batch import TokenBatch
from nemo_rl.interfaces import Objective
from nemo_rl.objectives.distillation import distillation_loss
from nemo_rl.objectives.logprobs import TokenOutputs
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.objectives.preference import (
    KTOObjective,
    PreferenceObjective,
    RewardModelObjective,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_reference_kl,
    odds_ratio_loss,
    simpo_loss,
)
from nemo_rl.objectives.rewards import overlong_penalty
from nemo_rl.objectives.value import ScalarOutputs
from nemo_rl.objectives.weights import Reduction, loss_weights

with warnings.catch_warnings(action="ignore"):  # TRL warns that these may change; its version is pinned
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.orpo import ORPOTrainer

LENGTHS = torch.tensor([3, 5, 1, 7, 4, 2, 6, 6])
CU_SEQLENS = torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0))
NUM_TOKENS, NUM_SEQUENCES, LONGEST = int(LENGTHS.sum()), len(LENGTHS), int(LENGTHS.max())
MASK = torch.arange(LONGEST) < LENGTHS[:, None]
CHOSEN = torch.tensor([True, False] * 4)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logprobs(seed: int) -> Tensor:
    return -draw(NUM_TOKENS, seed=seed).exp()


def padded(values: Tensor) -> Tensor:
    """Jagged [M] -> rows [B, T] with 0 after the end, as TRL lays them out."""
    return values.new_zeros(NUM_SEQUENCES, LONGEST).masked_scatter(MASK, values)


def batch(*, reduction: Reduction = "sequence_mean", **columns: Tensor) -> TokenBatch:
    everything = torch.ones(NUM_TOKENS, dtype=torch.bool)
    weights = loss_weights(everything, CU_SEQLENS, reduction=reduction, max_response_length=11)
    per_sequence = {name: column for name, column in columns.items() if len(column) == NUM_SEQUENCES}
    per_token = {name: column for name, column in columns.items() if name not in per_sequence}
    return TokenBatch(
        token_ids=torch.zeros(NUM_TOKENS, dtype=torch.int64),
        cu_seqlens=CU_SEQLENS,
        group_ids=torch.arange(NUM_SEQUENCES // 2).repeat_interleave(2),
        token_columns={**per_token, "loss_weights": weights.double()},
        sequence_columns={**per_sequence, "chosen": CHOSEN},
    )


def step_loss(objective: Objective, policy: Tensor, tokens: TokenBatch) -> Tensor:
    """What a training step makes of an objective."""
    token_loss, _ = objective(TokenOutputs(policy, torch.zeros_like(policy)), tokens)
    return (tokens.token_columns["loss_weights"] * token_loss).sum()


def assert_same(ours: Tensor, theirs: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, check_dtype=False)
    for mine, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        assert other.abs().max() > 1e-3, "a gradient of zeros would prove nothing"
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def stand_in(**attributes: Any) -> Any:
    """A trainer on one process that logs into nothing."""
    one_process = SimpleNamespace(
        device="cpu",
        num_processes=1,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, **_: x,
    )
    common = {
        "accelerator": one_process,
        "model": SimpleNamespace(training=True),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "current_gradient_accumulation_steps": 1,
    }
    return SimpleNamespace(**common | attributes)


def model_of(policy: Tensor) -> Any:
    """A model that answers with these log-probabilities, rows in the order of its inputs."""
    zeros = torch.zeros(NUM_SEQUENCES, LONGEST)
    return lambda **_: SimpleNamespace(log_probs=policy, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trl_rows() -> dict[str, Tensor]:
    """A prompt of one token before every answer."""
    mask = torch.nn.functional.pad(MASK.long(), (1, 0))
    return {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "sigmoid_norm"])
def test_pair_losses_with_a_reference(loss_type: str) -> None:
    policy, reference, beta = logprobs(1).requires_grad_(), logprobs(2), 0.3
    kind = {"sigmoid": "dpo", "sigmoid_norm": "dpo"}.get(loss_type, loss_type)
    objective = PreferenceObjective(kind=kind, beta=beta, average_logprobs=loss_type in ("ipo", "sigmoid_norm"))
    ours = step_loss(objective, policy, batch(reference_logprobs=reference))
    order = torch.cat([CHOSEN.nonzero(), (~CHOSEN).nonzero()])[:, 0]  # TRL: first all chosen, then all rejected
    inputs = {name: rows[order] for name, rows in trl_rows().items()}
    sums = padded(reference).sum(1)
    inputs |= {"ref_chosen_logps": sums[CHOSEN], "ref_rejected_logps": sums[~CHOSEN]}
    trainer = stand_in(
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
    )
    theirs = DPOTrainer._compute_loss(trainer, model_of(padded(policy)[order]), inputs, False)
    assert_same(ours, theirs, policy)


@pytest.mark.parametrize("kind", ["sigmoid", "simpo", "hinge", "ipo"])
def test_pair_losses_without_a_reference(kind: str) -> None:
    chosen, rejected = draw(9, seed=3).requires_grad_(), draw(9, seed=4).requires_grad_()
    beta, margin, smoothing = 0.7, 0.4, 0.1 if kind == "sigmoid" else 0.0
    trainer = stand_in(beta=beta, simpo_gamma=margin, label_smoothing=smoothing, loss_type=kind, alpha=0.0)
    theirs, _, _ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    ours = {
        "sigmoid": lambda: dpo_loss(chosen, rejected, beta=beta, label_smoothing=smoothing),
        "simpo": lambda: simpo_loss(chosen, rejected, beta=beta, margin=margin),
        "hinge": lambda: hinge_loss(chosen, rejected, beta=beta),
        "ipo": lambda: ipo_loss(chosen, rejected, beta=beta),
    }[kind]()
    weights = draw(9, seed=5)
    assert_same((ours * weights).sum(), (theirs * weights).sum(), chosen, rejected)


def test_odds_ratio_loss() -> None:
    chosen = (-draw(9, seed=3).exp()).float().requires_grad_()  # TRL computes it in float32
    rejected = (-draw(9, seed=4).exp()).float().requires_grad_()
    theirs, *_ = ORPOTrainer.odds_ratio_loss(stand_in(beta=1.0), chosen, rejected)
    torch.testing.assert_close(odds_ratio_loss(chosen, rejected), -theirs, rtol=1e-5, atol=1e-6)
    ours = odds_ratio_loss(chosen.double(), rejected.double()).sum()
    for mine, other in zip(
        torch.autograd.grad(ours, (chosen, rejected)),
        torch.autograd.grad(-theirs.sum(), (chosen, rejected)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kto(shift: float) -> None:
    policy, reference = logprobs(1).requires_grad_(), logprobs(2)
    mismatched = draw(NUM_SEQUENCES, seed=5) + shift
    objective = KTOObjective(beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
    reference_kl = kto_reference_kl(mismatched).expand(NUM_SEQUENCES)
    ours = step_loss(objective, policy, batch(reference_logprobs=reference, reference_kl=reference_kl))
    trainer = stand_in(
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.3,
        undesirable_weight=0.7,
        calculate_KL=True,
        _compute_kl_logps=lambda *_: mismatched,
    )
    inputs = trl_rows() | {
        "label": CHOSEN,
        "ref_logps": padded(reference).sum(1),
        "ref_KL_logps": torch.zeros(NUM_SEQUENCES),
    }
    assert_same(ours, KTOTrainer._compute_loss(trainer, model_of(padded(policy)), inputs, False), policy)


@pytest.mark.parametrize("centering", [None, 0.3])
def test_reward_model_loss_with_margins(centering: float | None) -> None:
    scores, margins = draw(NUM_SEQUENCES, seed=1).requires_grad_(), draw(NUM_SEQUENCES, seed=2).abs()
    values = torch.zeros(NUM_TOKENS, dtype=torch.float64).index_copy(0, CU_SEQLENS[1:] - 1, scores)
    tokens = batch(margins=margins)
    objective = RewardModelObjective(margin_scale=1.0, centering_weight=centering or 0.0)
    token_loss, _ = objective(ScalarOutputs(values), tokens)
    order = torch.cat([CHOSEN.nonzero(), (~CHOSEN).nonzero()])[:, 0]
    inputs = {"attention_mask": MASK[order], "margin": margins[CHOSEN]}
    trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=centering))
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores[order][:, None]), inputs)
    assert_same((tokens.token_columns["loss_weights"] * token_loss).sum(), theirs, scores)


GRPO = {
    "grpo": (ClippedPolicyObjective(), "sequence_mean", {"loss_type": "grpo"}),
    "bnpo": (ClippedPolicyObjective(), "token_mean", {"loss_type": "bnpo"}),
    "dr_grpo": (ClippedPolicyObjective(), "constant", {"loss_type": "dr_grpo"}),
    "dapo": (ClippedPolicyObjective(ratio_clip_max=0.28), "token_mean", {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dual clip": (
        ClippedPolicyObjective(ratio_clip_c=1.5),
        "token_mean",
        {"loss_type": "bnpo", "args": SimpleNamespace(delta=1.5, use_bias_correction_kl=False)},
    ),
    "gspo": (
        ClippedPolicyObjective(sequence_level_ratio=True),
        "sequence_mean",
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    "gspo, tight": (
        ClippedPolicyObjective(ratio_clip_min=0.01, ratio_clip_max=0.02, sequence_level_ratio=True),
        "sequence_mean",
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.01, "epsilon_high": 0.02},
    ),
    "cispo": (  # TRL bounds the ratio above only, and gives the bound itself
        ClippedPolicyObjective(policy_loss="cispo", ratio_clip_min=1.0, ratio_clip_max=0.2),
        "token_mean",
        {"loss_type": "cispo", "epsilon_high": 1.2},
    ),
    "grpo with KL": (
        ClippedPolicyObjective(kl_weight=0.2, kl_input_clamp=None, kl_output_clamp=None),
        "sequence_mean",
        {"loss_type": "grpo", "beta": 0.2},
    ),
    "truncated importance sampling": (
        ClippedPolicyObjective(correction="token", correction_high=1.1),
        "token_mean",
        {"loss_type": "bnpo", "mode": "token_truncate"},
    ),
    "icepop": (
        ClippedPolicyObjective(correction="icepop", correction_low=0.5, correction_high=1.5),
        "token_mean",
        {"loss_type": "bnpo", "mode": "token_mask"},
    ),
    "truncated sequence weights": (
        ClippedPolicyObjective(correction="sequence", correction_high=1.1),
        "token_mean",
        {"loss_type": "bnpo", "mode": "sequence_truncate"},
    ),
}


@pytest.mark.parametrize("name", GRPO)
def test_policy_losses(name: str) -> None:
    objective, reduction, attributes = GRPO[name]
    policy, advantages = logprobs(1).requires_grad_(), draw(NUM_SEQUENCES, seed=3)
    old, reference = policy.detach() + 0.3 * draw(NUM_TOKENS, seed=4), policy.detach() + draw(NUM_TOKENS, seed=5)
    rollout = old + 0.3 * draw(NUM_TOKENS, seed=6)
    per_token = advantages.repeat_interleave(LENGTHS)
    columns = {"advantages": per_token, "old_logprobs": old, "reference_logprobs": reference}
    tokens = batch(reduction=reduction, rollout_logprobs=rollout, **columns)
    inputs = {
        "prompt_ids": torch.zeros(NUM_SEQUENCES, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(NUM_SEQUENCES, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(NUM_SEQUENCES, LONGEST, dtype=torch.int64),
        "completion_mask": MASK.long(),
        "advantages": advantages,
        "old_per_token_logps": padded(old),
        "ref_per_token_logps": padded(reference),
        "num_items_in_batch": torch.tensor(NUM_TOKENS),
        "importance_sampling_ratio": trl_importance_ratio(attributes.get("mode"), old - rollout, objective),
    }
    settings = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (padded(policy), torch.zeros_like(padded(policy)), None),
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "use_vllm": "mode" in attributes,
        "vllm_importance_sampling_correction": True,
        "max_completion_length": 11,
        "_entropy_bonus_enabled": False,
    }
    theirs = GRPOTrainer._compute_loss(stand_in(**settings | attributes), None, inputs)
    assert_same(step_loss(objective, policy, tokens), theirs, policy)


def trl_importance_ratio(mode: str | None, log_weight: Tensor, objective: ClippedPolicyObjective) -> Tensor:
    """The few lines of TRL's 600-line method of rollouts that weigh a sampler's tokens, copied in its padded form."""
    low, high = objective.correction_low, objective.correction_high
    difference = padded(log_weight)
    ratio = (difference.sum(-1, keepdim=True) if mode == "sequence_truncate" else difference).exp()
    if mode == "token_mask":
        return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
    return ratio.clamp(min=low, max=high)


@pytest.mark.parametrize("forward_weight", [1.0, 0.0])
def test_divergences_of_whole_vocabularies(forward_weight: float) -> None:
    student, teacher = draw(6, 11, seed=1).requires_grad_(), draw(6, 11, seed=2)
    ours = distillation_loss(student, teacher.log_softmax(-1), forward_weight=forward_weight)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=1 - forward_weight, reduction="none")
    weights = draw(6, seed=3)
    assert_same((ours * weights).sum(), (theirs.sum(-1) * weights).sum(), student)


def test_overlong_punishment() -> None:
    lengths = torch.arange(1, 101)
    theirs = get_soft_overlong_punishment(100, 20)([[0] * length for length in lengths])
    torch.testing.assert_close(overlong_penalty(lengths, max_length=100, buffer=20), torch.tensor(theirs))
