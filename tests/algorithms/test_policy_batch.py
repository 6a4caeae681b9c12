"""What becomes of judged groups before they are trained on."""

import pytest
import torch
from torch import Tensor

from nemo_rl.algorithms.policy_batch import minibatches, policy_batch, with_advantages
from nemo_rl.algorithms.sampling import has_spread
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import Message, Rollout, RolloutGroup, StopReason, Task
from nemo_rl.metrics import Metrics, scalars

PROMPT = 3


def config(*settings: str) -> GRPOConfig:
    sizes = ("grpo.num_prompts_per_step=2", "grpo.num_generations_per_prompt=3", "policy.generation.max_new_tokens=8")
    return load_config(None, [*sizes, *settings], GRPOConfig).config


type Answer = tuple[float | dict[str, float], int, StopReason]


def group(index: int, *answers: Answer, version: int = 4) -> RolloutGroup:
    """A group of rollouts (reward or named rewards, sampled tokens, stop reason)."""
    task = Task((Message(role="user", content="?"),), "math", index=index)
    rollouts = tuple(
        Rollout(
            token_ids=torch.arange(PROMPT + length),
            loss_mask=torch.arange(PROMPT + length) >= PROMPT,
            rollout_logprobs=torch.zeros(PROMPT + length),
            rewards=reward if isinstance(reward, dict) else {"reward": reward},
            stop_reason=stop,
            policy_version=version,
        )
        for reward, length, stop in answers
    )
    return RolloutGroup(task, rollouts)


def laid_out(
    settings: GRPOConfig, groups: list[RolloutGroup], *, kl: float | Tensor = 0.0
) -> tuple[TokenBatch, Metrics]:
    """As the loop does it, for the weights of version 4; its tokens [N] are `kl` above the reference (k1)."""
    longest = settings.policy.generation.max_new_tokens
    batch, metrics = policy_batch(settings.grpo, groups, max_new_tokens=longest, version=4)
    if settings.loss_fn.kl_in_reward:
        old = batch.token_columns["rollout_logprobs"]
        batch = batch.with_columns(old_logprobs=old, reference_logprobs=old - kl)
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


SCALED = {"source_min": -1.0, "source_max": 3.0, "target_min": 1.0, "target_max": 2.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1, 1, 1.25, 2, 2]),
        ({"source_min": 0.0}, [1, 1, 1, 2, 2]),
        ({"source_max": 5.0}, [1, 1, 7 / 6, 5 / 3, 2]),
        ({"target_min": -2.0}, [-2, -2, -1, 2, 2]),
        ({"target_max": 0.0}, [1, 1, 0.75, 0, 0]),
    ],
)
def test_rewards_are_scaled_along_a_line_and_clamped_at_both_ends(
    changes: dict[str, float], expected: list[float]
) -> None:
    rule = ", ".join(f"{name}: {value}" for name, value in (SCALED | changes).items())
    answers: list[Answer] = [(reward, 2, "stop") for reward in (-2.0, -1.0, 0.0, 3.0, 5.0)]
    batch, metrics = laid_out(config(f"grpo.reward_scaling={{{rule}}}"), [group(0, *answers)])
    assert batch.sequence_columns["rewards"].tolist() == pytest.approx(expected)
    assert batch.sequence_columns["rewards/reward"].tolist() == [-2, -1, 0, 3, 5]  # what the environment said
    figures = scalars(metrics)
    assert figures["shaped_reward/mean"] == pytest.approx(sum(expected) / 5)
    assert figures["shaped_reward/min"] == pytest.approx(min(expected))
    assert figures["shaped_reward/max"] == pytest.approx(max(expected))


LONG = group(0, (1.0, 10, "stop"), (0.8, 22, "stop"), (0.6, 25, "stop"), (0.4, 30, "length"))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("overlong_buffer_length: 5, overlong_buffer_penalty: 0.5, max_response_length: 25", [1, 0.6, 0.1, -0.6]),
        ("overlong_buffer_length: 5, overlong_buffer_penalty: 0.5", [1, 0.8, 0.6, -0.1]),  # of the 30 that are sampled
        ("overlong_buffer_length: 5, max_response_length: 25", [1, 0.4, -0.4, -1.6]),
        ("overlong_buffer_length: 10, overlong_buffer_penalty: 0.5", [1, 0.7, 0.35, -0.1]),
    ],
)
def test_overlong_answers_are_penalised_as_in_the_worked_example(rule: str, expected: list[float]) -> None:
    settings = config(f"grpo.reward_shaping={{{rule}}}", "policy.generation.max_new_tokens=30")
    batch, _ = laid_out(settings, [LONG])
    torch.testing.assert_close(batch.sequence_columns["rewards"], torch.tensor(expected))


def test_the_penalty_comes_after_the_scaling_which_would_clamp_it() -> None:
    settings = config(
        "grpo.reward_scaling={target_min: -1.0}",
        "grpo.reward_shaping={overlong_buffer_length: 4, overlong_buffer_penalty: 0.5}",
    )
    assert laid_out(settings, [MIXED])[0].sequence_columns["rewards"].tolist() == [1, -1, -1.5]


@pytest.mark.parametrize(
    ("bounds", "expected", "share"),
    [
        (("advantage_clip_low=-0.25",), [1, -0.25, -0.25], 12 / 14),
        (("advantage_clip_high=0.75",), [0.75, -0.5, -0.5], 2 / 14),
        (("advantage_clip_low=-0.25", "advantage_clip_high=0.75"), [0.75, -0.25, -0.25], 1),
        (("advantage_clip_low=0.1",), [1, 0.1, 0.1], 12 / 14),  # and prompts stay without any
    ],
)
def test_advantages_are_clipped_to_their_bounds(bounds: tuple[str, ...], expected: list[float], share: float) -> None:
    plain = "grpo.adv_estimator.normalize_rewards=false"
    batch, metrics = laid_out(config(plain, *(f"grpo.{bound}" for bound in bounds)), [MIXED])
    assert batch.sequence_columns["advantages"].tolist() == pytest.approx(expected)
    assert scalars(metrics)["advantages/share_clipped"] == pytest.approx(share)
    assert not batch.token_columns["advantages"][~batch.token_columns["loss_mask"]].any()


IN_REWARD = (
    "loss_fn.reference_policy_kl_penalty=0.5",
    "loss_fn.reference_policy_kl_place=reward",
    "loss_fn.reference_policy_kl_type=k1",
)
PLAIN = "grpo.adv_estimator={name: grpo, normalize_rewards: false, use_leave_one_out_baseline: false}"


def test_the_kl_in_the_reward_is_summed_over_the_answer_and_subtracted() -> None:
    """2, 4 and 8 tokens at 0.2 and a weight of 0.5: the rewards 1, 0, 0 become 0.8, -0.4, -0.8."""
    batch, metrics = laid_out(config(PLAIN, *IN_REWARD), [MIXED], kl=0.2)
    expected = [0.8 + 0.4 / 3, -0.4 + 0.4 / 3, -0.8 + 0.4 / 3]
    assert batch.sequence_columns["advantages"].tolist() == pytest.approx(expected)
    assert scalars(metrics)["reference_kl"] == pytest.approx(0.2)
    assert batch.sequence_columns["rewards"].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("setting", "estimate"),
    [
        ("reference_policy_kl_type=k2", 4.5),
        ("reference_policy_kl_type=k3", 2.718281828**-3 - 1 + 3),
        ("kl_input_clamp_value=0.5", 0.5),
        ("kl_output_clamp_value=0.25", 0.25),
    ],
)
def test_the_kl_in_the_reward_is_the_estimate_asked_for(setting: str, estimate: float) -> None:
    batch, metrics = laid_out(config(PLAIN, *IN_REWARD, f"loss_fn.{setting}"), [MIXED], kl=3.0)
    assert scalars(metrics)["reference_kl"] == pytest.approx(estimate)
    first, second = batch.sequence_columns["advantages"].tolist()[:2]
    assert first - second == pytest.approx(1 + 0.5 * (4 - 2) * estimate)


SIZES = (
    "grpo.num_generations_per_prompt=4",
    "policy.generation.max_new_tokens=1000",
    "policy.max_total_sequence_length=2000",
)


@pytest.mark.parametrize(
    "penalty", [IN_REWARD, ("grpo.reward_shaping={overlong_buffer_length: 1000}",)], ids=["kl", "length"]
)
def test_answers_that_differ_by_a_penalty_alone_do_not_blow_the_advantages_up(penalty: tuple[str, ...]) -> None:
    """One right answer of four; without it the others are worth the same but for some thousandths of a penalty."""
    answers = ((1.0, 4, "stop"), (0.0, 4, "stop"), (0.0, 5, "stop"), (0.0, 6, "stop"))
    batch, _ = laid_out(config(*SIZES, *penalty), [group(0, *answers)], kl=0.001)
    assert batch.sequence_columns["rewards"].unique().numel() == (2 if penalty is IN_REWARD else 4)
    bare, _ = laid_out(config(*SIZES), [group(0, *answers)])
    expected = bare.sequence_columns["advantages"]
    torch.testing.assert_close(batch.sequence_columns["advantages"], expected, rtol=0, atol=0.01)


def test_reinforce_plus_plus_pays_the_kl_where_it_arises_and_normalises_over_tokens() -> None:
    """Of two answers, of 1 and 2 tokens with the rewards 1 and 0, the rewards to come are 0.9 and -0.2, -0.1."""
    one = ("grpo.num_generations_per_prompt=1", "policy.train_global_batch_size=2")
    settings = config("grpo.adv_estimator={name: reinforce_plus_plus}", *IN_REWARD, *one)
    groups = [group(0, (1.0, 1, "stop")), group(1, (0.0, 2, "stop"))]
    batch, _ = laid_out(settings, groups, kl=0.2)
    found = batch.token_columns["advantages"][batch.token_columns["loss_mask"]]
    deviation = 0.37**0.5  # of 0.9, -0.2 and -0.1 around their mean 0.2
    torch.testing.assert_close(found, torch.tensor([0.7, -0.4, -0.3]) / deviation, rtol=1e-5, atol=1e-5)


def test_reinforce_plus_plus_baseline_subtracts_the_group_first() -> None:
    """2/3, -1/3, -1/3 of 2, 4 and 8 tokens have the mean -4/21 and, around it, 6/7, -1/7, -1/7, in either group."""
    easier = group(1, (3.0, 2, "stop"), (2.0, 4, "stop"), (2.0, 8, "length"))
    settings = config("grpo.adv_estimator={name: reinforce_plus_plus, minus_baseline: true}")
    batch, _ = laid_out(settings, [MIXED, easier])
    deviation = (2 * 84 / 49 / 27) ** 0.5
    expected = [6 / 7 / deviation, -1 / 7 / deviation, -1 / 7 / deviation] * 2
    assert batch.sequence_columns["advantages"].tolist() == pytest.approx(expected, rel=1e-5)


def test_reinforce_plus_plus_baseline_pays_the_kl_that_is_to_come() -> None:
    """Of 1 and 2 tokens, the last two at 0.2 and 0.4: 0.5, -0.8 and -0.7 before the batch is normalised."""
    settings = config("grpo.adv_estimator={name: reinforce_plus_plus, minus_baseline: true}", *IN_REWARD)
    kl = torch.tensor([0.0] * PROMPT + [0.0] + [0.0] * PROMPT + [0.2, 0.4])
    batch, _ = laid_out(settings, [group(0, (1.0, 1, "stop"), (0.0, 2, "stop"))], kl=kl)
    found = batch.token_columns["advantages"][batch.token_columns["loss_mask"]]
    before = torch.tensor([0.5, -0.8, -0.7])
    torch.testing.assert_close(found, (before - before.mean()) / before.std(), rtol=1e-5, atol=1e-5)


OPPOSED = group(0, *(({"a": a, "b": 1.0 - a}, 2, "stop") for a in (1.0, 0.0, 0.0)))


@pytest.mark.parametrize(("weights", "sign"), [("{a: 2, b: 1}", 1), ("{a: 1, b: 2}", -1), ("null", 0)])
def test_gdpo_weighs_every_named_reward(weights: str, sign: int) -> None:
    """Two rewards that are each other's opposite: whichever weighs more decides, and equal ones cancel out."""
    batch, _ = laid_out(config(f"grpo.adv_estimator={{name: gdpo, reward_weights: {weights}}}"), [OPPOSED])
    unit = 2 / 3**0.5
    expected = [sign * unit, -sign * unit / 2, -sign * unit / 2]
    assert batch.sequence_columns["advantages"].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [
        ((1.0, 0.0, 0.0, 0.0), True),  # without the winner, the others are equal: that says nothing about the group
        ((0.0, 0.0, 0.0, 1.0), True),
        ((1.0, 1.0, 1.0, 1.0), False),
        ((0.95, 0.95, 0.95, 0.95), False),
    ],
)
def test_dynamic_sampling_decides_by_group_on_the_spread_of_its_rewards(rewards: tuple[float, ...], kept: bool) -> None:
    judged = group(0, *((reward, 2, "stop") for reward in rewards))
    assert has_spread(config(), judged) is kept
    batch, _ = laid_out(config(), [judged])
    assert bool(batch.token_columns["advantages"].any()) is kept  # no group is kept that teaches nothing


def test_dynamic_sampling_looks_at_what_is_trained_on() -> None:
    cut = group(0, (1.0, 2, "stop"), (1.0, 4, "stop"), (0.0, 8, "length"))
    assert has_spread(config(), cut) and not has_spread(config("grpo.overlong_filtering=true"), cut)
    all_cut = group(0, (1.0, 8, "length"), (0.0, 8, "length"))
    assert not has_spread(config("grpo.overlong_filtering=true"), all_cut)


def test_dynamic_sampling_of_gdpo_keeps_groups_whose_rewards_differ_by_name() -> None:
    gdpo = config("grpo.adv_estimator={name: gdpo}")
    assert has_spread(gdpo, OPPOSED) and not has_spread(config(), OPPOSED)
    assert not has_spread(gdpo, group(0, *(({"a": 1.0, "b": 0.5}, 2, "stop"),) * 3))
