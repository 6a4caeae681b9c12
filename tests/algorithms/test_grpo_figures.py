"""What a step of the GRPO family logs about itself, and what must not change its figures."""

import json
from itertools import groupby
from pathlib import Path

import pytest

from tiny_letters import (  # pyright: ignore[reportImplicitRelativeImport]
    RIGHT_AND_SHORT,
    letters_run,
    make_letters_model,
)
from tiny_run import VOWELS  # pyright: ignore[reportImplicitRelativeImport]

ONE_STEP = "grpo.max_num_steps=1"
TWO_STEPS = "policy.train_global_batch_size=12"
WHICH_VOWEL = 'def reward(completion: str) -> float:\n    return 1.0 + "aeiou".find(completion[:1] or "-")\n'
PLAIN = "grpo.adv_estimator={name: grpo, normalize_rewards: false, use_leave_one_out_baseline: false}"


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_letters_model(tmp_path_factory.mktemp("letters"))


def figures(letters: Path, folder: Path, *settings: str, **more: str) -> dict[str, float]:
    """What the training of one step logs, by name."""
    (line,) = letters_run(letters, folder, ONE_STEP, *settings, **more)
    return {name.removeprefix("train/"): value for name, value in line.items() if value is not None}


@pytest.mark.parametrize("more", [(), (TWO_STEPS,)], ids=["on_policy", "two_steps"])
@pytest.mark.parametrize(
    ("kind", "effect"),
    [("token", "clamped"), ("sequence", "clamped"), ("icepop", "dropped"), ("sequence_mask", "dropped")],
)
def test_a_correction_logs_its_weights_before_it_bounds_them_and_the_share_it_changes(
    kind: str, effect: str, more: tuple[str, ...], letters: Path, tmp_path: Path
) -> None:
    """Sampler and trainer agree here, so every weight is 1: within these bounds all of them stay, or none."""
    within = figures(letters, tmp_path / "within", f"loss_fn.correction={{type: {kind}, low: 0.5, high: 1.5}}", *more)
    beyond = figures(letters, tmp_path / "beyond", f"loss_fn.correction={{type: {kind}, low: 1.5, high: 2.0}}", *more)
    for found, share in ((within, 0), (beyond, 1)):
        weights = [found[f"correction_weight_{name}"] for name in ("mean", "max", "ess")]
        assert weights == pytest.approx([1, 1, 1], abs=1e-4)
        assert found[f"correction_share_{effect}"] == share
    if effect == "dropped":
        assert beyond["grad_norm"] == 0 < within["grad_norm"]
    elif not more:
        assert beyond["grad_norm"] == pytest.approx(1.5 * within["grad_norm"], rel=1e-3)


def test_every_named_reward_and_every_phase_is_logged(letters: Path, tmp_path: Path) -> None:
    settings = ("loss_fn.reference_policy_kl_penalty=0.1", TWO_STEPS)
    found = figures(letters, tmp_path, *settings, code=RIGHT_AND_SHORT)
    assert found["rewards/vowels"] + found["rewards/start"] == pytest.approx(found["reward/mean"])
    assert {"reference_kl", "rollout_kl", "policy_kl"} < found.keys()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for phase in ("generate", "logprobs", "train"):
        assert lines[0][f"timing/{phase}_seconds"] > 0 and lines[0][f"timing/{phase}_tokens_per_second"] > 0


def test_shaped_rewards_are_logged_beside_those_of_the_environment(letters: Path, tmp_path: Path) -> None:
    plain = figures(letters, tmp_path / "plain")
    scaled = figures(letters, tmp_path / "scaled", "grpo.reward_scaling={target_max: 2.0}", PLAIN)
    for name in ("mean", "min", "max"):
        assert scaled[f"reward/{name}"] == plain[f"reward/{name}"] == pytest.approx(plain[f"shaped_reward/{name}"])
        assert scaled[f"shaped_reward/{name}"] == pytest.approx(2 * plain[f"reward/{name}"])
    unscaled = figures(letters, tmp_path / "unscaled", PLAIN)
    assert scaled["advantages/max"] == pytest.approx(2 * unscaled["advantages/max"])


def test_every_pass_over_a_step_compares_with_the_weights_before_the_first(letters: Path, tmp_path: Path) -> None:
    one = figures(letters, tmp_path / "one")
    three = figures(letters, tmp_path / "three", "grpo.num_epochs_per_step=3")
    assert (one["optimizer_steps"], three["optimizer_steps"]) == (1, 3)
    assert one["ratio_max"] == 1 and three["ratio_max"] > 1.05
    assert three["token_mult_prob_error"] < 1.0001
    assert three["loss_tokens"] == 3 * one["loss_tokens"] and three["tokens_sampled"] == one["tokens_sampled"]


@pytest.mark.parametrize("rule", ["temperature=0.5", "top_p=0.6", "top_k=5", "min_p=0.3"])
def test_the_trainer_scores_answers_as_they_were_sampled(rule: str, letters: Path, tmp_path: Path) -> None:
    """Both where it scores before the step and, on-policy, where the loss does."""
    for name, more in (("once", ()), ("twice", (TWO_STEPS, "grpo.skip_uniform_groups=false"))):
        found = figures(letters, tmp_path / name, f"policy.generation.{rule}", *more)
        assert found["token_mult_prob_error"] < 1.0005
        assert found["importance_weight_mean"] == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize(
    "settings",
    [
        ("loss_fn.reduction=sequence_mean", "loss_fn.ratio_level=sequence", TWO_STEPS),
        ("loss_fn.reduction=constant", "loss_fn.policy_loss=reinforce"),
        ("loss_fn.policy_loss=cispo", "loss_fn.correction={type: sequence}", TWO_STEPS),
        ("loss_fn.reference_policy_kl_penalty=0.1", "loss_fn.use_on_policy_kl_approximation=true"),
        ("grpo.overlong_filtering=true", "grpo.adv_estimator={name: reinforce_plus_plus}"),
    ],
)
def test_no_size_of_micro_batch_changes_a_loss_of_the_family(
    settings: tuple[str, ...], letters: Path, tmp_path: Path
) -> None:
    """Normalised per micro-batch, answers of unequal length or number would weigh otherwise."""
    more = (
        "policy.generation.stop_strings=[e,o,s,t]",  # so that answers differ in length
        "policy.optimizer={name: torch.optim.SGD, kwargs: {lr: 0.1}}",
        *settings,
    )
    whole, cut = (
        figures(letters, tmp_path / str(size), f"policy.train_mb_tokens={size}", *more) for size in (100_000, 32)
    )
    assert cut["micro_batches"] > whole["micro_batches"]
    for name in ("loss", "grad_norm", "entropy", "ratio_max", "loss_tokens"):
        assert cut[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


def test_equal_prompts_of_a_step_are_groups_of_their_own_in_every_round(letters: Path, tmp_path: Path) -> None:
    """Two records of one question fill a step of four prompts, and, an answer being one letter, do so repeatedly."""
    tmp_path.joinpath("data.jsonl").write_text('{"prompt": "What is 1 + 1?", "answer": "2"}\n' * 2)
    data = f"data.train={{name: local, path: {tmp_path / 'data.jsonl'}, environment: function}}"
    short = "policy.generation.max_new_tokens=1"
    rule = "grpo.dynamic_sampling={max_tries: 20}"
    found = figures(letters, tmp_path, data, short, PLAIN, rule, code=WHICH_VOWEL)
    assert found["dynamic_sampling/rounds"] > 1

    text = (tmp_path / "run" / "rollouts" / "step_1.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    groups = [list(members) for _, members in groupby(records, key=lambda record: record["group"])]
    assert [len(members) for members in groups] == [6, 6, 6, 6]
    assert len({tuple(one["completion"] for one in members) for members in groups}) == 4  # no draw is repeated
    for members in groups:
        mean = sum(one["reward"] for one in members) / 6
        assert [one["advantage"] for one in members] == pytest.approx([one["reward"] - mean for one in members])
    assert len({sum(one["reward"] for one in members) for members in groups}) > 1  # merged, the means would be one


def test_groups_that_cannot_be_judged_are_replaced_and_counted_in_every_round(letters: Path, tmp_path: Path) -> None:
    """A failure is neither a zero, which would give a group its spread, nor an answer less."""
    failing = VOWELS.replace("completion: str", "completion: str, ground_truth: str").replace(
        "    return",
        "    if int(ground_truth) % 3 == 0 and completion < 'M':\n        raise OSError('gone')\n    return",
    )
    rule = ("grpo.dynamic_sampling={max_tries: 20}", "grpo.max_failed_group_share=0.9")
    found = figures(letters, tmp_path, *rule, code=failing)
    assert found["dropped_groups"] == found["dropped_groups/environment_failure"] > 0
    judged = 4 * found["dynamic_sampling/rounds"] - found["dropped_groups"]
    kept = judged * (1 - found["dynamic_sampling/share_filtered"])
    assert kept == pytest.approx(4 + found["dynamic_sampling/surplus_groups"])
    assert (tmp_path / "run" / "rollouts" / "step_1.jsonl").read_text().count("\n") == 24
