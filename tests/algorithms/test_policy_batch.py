"""What becomes of judged groups before they are trained on."""

import pytest
import torch

from nemo_rl.algorithms.policy_batch import minibatches, policy_batch, with_advantages
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import Message, Rollout, RolloutGroup, StopReason, Task
from nemo_rl.metrics import Metrics, scalars

PROMPT = 3


def config(*settings: str) -> GRPOConfig:
    sizes = ("grpo.num_prompts_per_step=2", "grpo.num_generations_per_prompt=3", "policy.generation.max_new_tokens=8")
    return load_config(None, [*sizes, *settings], GRPOConfig).config


def group(index: int, *answers: tuple[float, int, StopReason], version: int = 4) -> RolloutGroup:
    """A group of rollouts (reward, sampled tokens, stop reason)."""
    task = Task((Message(role="user", content="?"),), "math", index=index)
    rollouts = tuple(
        Rollout(
            token_ids=torch.arange(PROMPT + length),
            loss_mask=torch.arange(PROMPT + length) >= PROMPT,
            rollout_logprobs=torch.zeros(PROMPT + length),
            rewards={"reward": reward},
            stop_reason=stop,
            policy_version=version,
        )
        for reward, length, stop in answers
    )
    return RolloutGroup(task, rollouts)


def laid_out(settings: GRPOConfig, groups: list[RolloutGroup]) -> tuple[TokenBatch, Metrics]:
    """As the loop does it, for the weights of version 4."""
    longest = settings.policy.generation.max_new_tokens
    batch, metrics = policy_batch(settings.grpo, groups, max_new_tokens=longest, version=4)
    batch, advantages = with_advantages(settings, batch)
    return batch, metrics | advantages


MIXED = group(0, (1.0, 2, "stop"), (0.0, 4, "stop"), (0.0, 8, "length"))
UNIFORM = group(1, (1.0, 5, "stop"), (1.0, 1, "stop"), (1.0, 2, "stop"))


def test_filtered_answers_count_neither_in_the_baseline_nor_in_the_normaliser() -> None:
    settings = config(
        "grpo.overlong_filtering=true", "grpo.adv_estimator.normalize_rewards=false", "grpo.skip_uniform_groups=false"
    )
    batch, metrics = laid_out(settings, [MIXED, UNIFORM])
    assert batch.sequence_columns["advantages"].tolist() == [1, -1, 0, 0, 0, 0]  # 1 against 0, not against (0, 0)
    assert scalars(metrics)["share_filtered"] == pytest.approx(1 / 6)

    (part,) = minibatches(settings, batch)
    assert part.lengths.tolist() == [PROMPT + 2, PROMPT + 4, PROMPT + 5, PROMPT + 1, PROMPT + 2]
    weights = part.token_columns["loss_weights"][part.token_columns["loss_mask"]]
    torch.testing.assert_close(weights, torch.full((14,), 1 / 14))  # 2 + 4 + 5 + 1 + 2 tokens, the cut one's 8 left out


@pytest.mark.parametrize(
    ("normalize", "leave_one_out", "expected"),
    [
        ("false", "true", [1, -1 / 2, -1 / 2]),
        ("false", "false", [2 / 3, -1 / 3, -1 / 3]),
        ("true", "true", [1, -(2**-0.5), -(2**-0.5)]),  # the peers of the best are all equal
        ("true", "false", [2 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5]),  # the deviation of 1, 0, 0 is 3^-1/2
    ],
)
def test_baseline_and_deviation_are_those_asked_for(normalize: str, leave_one_out: str, expected: list[float]) -> None:
    baseline = f"grpo.adv_estimator.use_leave_one_out_baseline={leave_one_out}"
    batch, _ = laid_out(config(f"grpo.adv_estimator.normalize_rewards={normalize}", baseline), [MIXED, UNIFORM])
    assert batch.sequence_columns["advantages"].tolist() == pytest.approx([*expected, 0, 0, 0], rel=1e-5)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token_mean", [1 / 22] * 14),
        ("sequence_mean", [1 / 12] * 2 + [1 / 24] * 4 + [1 / 48] * 8),
        ("constant", [1 / 48] * 14),
    ],
)
def test_a_uniform_group_is_not_computed_but_stays_in_the_normaliser(reduction: str, expected: list[float]) -> None:
    settings = config(f"loss_fn.reduction={reduction}")
    batch, _ = laid_out(settings, [MIXED, UNIFORM])
    (part,) = minibatches(settings, batch)
    assert part.group_ids.tolist() == [0, 0, 0]
    weights = part.token_columns["loss_weights"][part.token_columns["loss_mask"]]
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_a_kl_term_keeps_uniform_groups_in_the_batch() -> None:
    settings = config("loss_fn.reference_policy_kl_penalty=0.1")
    (part,) = minibatches(settings, laid_out(settings, [MIXED, UNIFORM])[0])
    assert part.num_sequences == 6


def test_minibatches_are_normalised_each_by_itself_and_idle_ones_are_left_out() -> None:
    settings = config("policy.train_global_batch_size=3")
    parts = minibatches(settings, laid_out(settings, [UNIFORM, MIXED])[0])
    assert [part.group_ids.tolist() for part in parts] == [[1, 1, 1]]
    assert parts[0].token_columns["loss_weights"].sum() == pytest.approx(1)


def test_nothing_is_trained_when_every_answer_is_filtered_or_every_group_uniform() -> None:
    cut = group(0, (1.0, 8, "length"), (0.0, 8, "length"))
    for settings, groups in ((config("grpo.overlong_filtering=true"), [cut]), (config(), [UNIFORM])):
        assert minibatches(settings, laid_out(settings, groups)[0]) == []


def test_staleness_counts_versions_behind_the_weights_in_training() -> None:
    older = group(1, (1.0, 2, "stop"), (0.0, 2, "stop"), version=1)
    newest = group(0, (1.0, 2, "stop"), (0.0, 2, "stop"), version=4)
    figures = scalars(laid_out(config(), [newest, older])[1])
    assert (figures["staleness/mean"], figures["staleness/max"]) == (1.5, 3)
