"""PPO learns with either kind of critic, and a stopped run goes on as if it had not been."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import nemo_rl.algorithms.ppo as loop
from nemo_rl.config.schema.ppo import PPOConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import ConfigError
from nemo_rl.metrics import Metrics
from nemo_rl.workers.handles import Policy
from tiny_letters import late_reward, make_letters_model  # pyright: ignore[reportImplicitRelativeImport]
from tiny_ppo import ppo_run  # pyright: ignore[reportImplicitRelativeImport]
from tiny_run import (  # pyright: ignore[reportImplicitRelativeImport]
    make_tiny_llama,
    records,
    rollouts,
    saved_tensors,
)

SHARED = ("value={kind: shared}",)
SEPARATE = ("value={kind: separate}",)


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_letters_model(tmp_path_factory.mktemp("letters"))


KINDS = {
    "shared": SHARED,
    "separate": SEPARATE,
    "two_passes_over_halves": (*SEPARATE, "ppo.ppo_epochs=2", "policy.train_global_batch_size=12"),
    "kl_in_reward": (
        *SHARED,
        "loss_fn.reference_policy_kl_penalty=0.02",
        "loss_fn.reference_policy_kl_place=reward",
        "loss_fn.reference_policy_kl_type=k1",
    ),
    "kl_in_loss": (*SHARED, "loss_fn.reference_policy_kl_penalty=0.02"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_with_the_advantages_turned_round_it_does_not(
    kind: str, letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ppo_run(letters, tmp_path / "right", *KINDS[kind])
    assert late_reward(lines) > 0.3
    estimated = loop.with_advantages

    def turned(config: PPOConfig, batch: TokenBatch) -> tuple[TokenBatch, Metrics]:
        batch, metrics = estimated(config, batch)
        return batch.with_columns(advantages=-batch.token_columns["advantages"]), metrics

    monkeypatch.setattr(loop, "with_advantages", turned)
    assert late_reward(ppo_run(letters, tmp_path / "wrong", *KINDS[kind])) < 0.1


@pytest.mark.parametrize("kind", [SHARED, SEPARATE])
def test_a_critic_that_learns_alone_explains_more_and_leaves_the_policy_as_it_is(
    kind: tuple[str, ...], letters: Path, tmp_path: Path
) -> None:
    settings = ("ppo.policy_training_start_step=12", "ppo.max_num_steps=13", "value_loss_fn.cliprange=null", *kind)
    if kind == SEPARATE:
        settings = (*settings, "value.optimizer={name: torch.optim.AdamW, kwargs: {lr: 0.02}}")
    saving = ("checkpointing.enabled=true", "checkpointing.save_period=1", "checkpointing.keep_top_k=null")
    lines = ppo_run(letters, tmp_path, *settings, *saving)
    first, last = (saved_tensors(tmp_path / "run", step) for step in (1, 12))
    policy = [name for name in first if name.startswith("weights/") and "value_head" not in name]
    assert policy and all(torch.equal(first[name], last[name]) for name in policy)
    moved = saved_tensors(tmp_path / "run", 13)
    assert any(not torch.equal(moved[name], last[name]) for name in policy)
    losses = [line["train/value_loss"] or 0.0 for line in lines]
    assert sum(losses[9:12]) < sum(losses[:3])


@pytest.mark.parametrize("kind", [SHARED, SEPARATE])
def test_a_stopped_run_goes_on_bit_for_bit(kind: tuple[str, ...], letters: Path, tmp_path: Path) -> None:
    saving = ("checkpointing.enabled=true", "checkpointing.keep_top_k=null", *kind)
    ppo_run(letters, tmp_path / "whole", *saving, "ppo.max_num_steps=4")
    ppo_run(letters, tmp_path / "parts", *saving, "ppo.max_num_steps=2")
    ppo_run(letters, tmp_path / "parts", *saving, "ppo.max_num_steps=4")
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    assert records(whole) == records(parts) and rollouts(whole) == rollouts(parts)

    def everything(folder: Path) -> dict[str, Tensor]:
        tensors = saved_tensors(folder, 4)
        critic = saved_tensors(folder, 4, part="value") if kind == SEPARATE else {}
        return tensors | {f"value/{name}": tensor for name, tensor in critic.items()}

    left, right = everything(whole), everything(parts)
    assert left.keys() == right.keys() and [name for name in left if not torch.equal(left[name], right[name])] == []


def test_every_figure_of_a_step_is_logged(letters: Path, tmp_path: Path) -> None:
    (line,) = ppo_run(letters, tmp_path, *SEPARATE, "ppo.max_num_steps=1", "ppo.ppo_epochs=2")
    names = (
        *("value_loss", "value", "value_clip_share", "explained_variance", "values/mean", "returns/mean"),
        *("advantages/mean", "advantages/min", "advantages/max", "reward/mean", "response_length/mean"),
        *("policy_kl", "clip_share_low", "clip_share_high", "ratio_max", "entropy", "token_mult_prob_error"),
        *("grad_norm", "critic/grad_norm", "learning_rate", "critic/learning_rate", "tokens_sampled", "staleness/mean"),
    )
    assert [name for name in names if f"train/{name}" not in line] == []


def test_old_log_probabilities_are_computed_once_and_only_if_something_moves(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    logprobs = Policy.logprobs

    def counted(policy: Policy, batch: TokenBatch) -> object:
        calls.append(batch.num_sequences)
        return logprobs(policy, batch)

    monkeypatch.setattr(Policy, "logprobs", counted)
    ppo_run(letters, tmp_path / "one", "ppo.max_num_steps=1")
    assert calls == []
    ppo_run(letters, tmp_path / "two", "ppo.max_num_steps=1", "ppo.ppo_epochs=3")
    assert calls == [24]


def test_a_critic_with_another_vocabulary_is_refused(letters: Path, tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"value\.model_name=.*has 49152 tokens and another vocabulary"):
        ppo_run(letters, tmp_path, f"value={{kind: separate, model_name: {other}}}")
