"""Every member of the GRPO family learns what is rewarded, and settings that mean the same give the same run."""

from collections.abc import Callable
from pathlib import Path

import pytest

import nemo_rl.algorithms.grpo as loop
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import RolloutError
from nemo_rl.metrics import Metrics
from nemo_rl.workers.handles import Policy
from tiny_letters import (  # pyright: ignore[reportImplicitRelativeImport]
    RIGHT_AND_SHORT,
    late_reward,
    letters_run,
    make_letters_model,
)
from tiny_run import VOWELS  # pyright: ignore[reportImplicitRelativeImport]

TWO_STEPS = "policy.train_global_batch_size=12"
KL = "loss_fn.reference_policy_kl_penalty=0.02"
IN_REWARD = "loss_fn.reference_policy_kl_place=reward"
PLAIN = "grpo.adv_estimator={name: grpo, normalize_rewards: false, use_leave_one_out_baseline: false}"
LEFT_OUT = "grpo.adv_estimator={name: grpo, normalize_rewards: false, use_leave_one_out_baseline: true}"
FAMILY: dict[str, tuple[str, ...]] = {
    "grpo": (),
    "dr_grpo": (PLAIN, "loss_fn.reduction=constant"),
    "dapo": (
        TWO_STEPS,
        "loss_fn.ratio_clip_max=0.28",
        "grpo.dynamic_sampling.max_tries=20",
        "grpo.reward_shaping={overlong_buffer_length: 2, overlong_buffer_penalty: 0.1}",
        "grpo.max_num_steps=9",
    ),
    "gspo": (TWO_STEPS, "loss_fn.ratio_level=sequence", "loss_fn.reduction=sequence_mean"),
    "cispo": (TWO_STEPS, "loss_fn.policy_loss=cispo", "loss_fn.ratio_clip_min=1.0", "loss_fn.ratio_clip_max=4.0"),
    "rloo": (LEFT_OUT, "loss_fn.policy_loss=reinforce", "loss_fn.reduction=constant"),
    "reinforce_plus_plus": (
        "grpo.adv_estimator={name: reinforce_plus_plus}",
        KL,
        IN_REWARD,
        "loss_fn.reference_policy_kl_type=k1",
    ),
    "reinforce_plus_plus_baseline": (
        "grpo.adv_estimator={name: reinforce_plus_plus, minus_baseline: true}",
        KL,
        "loss_fn.reference_policy_kl_type=k2",
    ),
    "gdpo": ("grpo.adv_estimator={name: gdpo, reward_weights: {vowels: 1.0, start: 0.5}}",),
    "dual_clip_two_passes": (TWO_STEPS, "loss_fn.ratio_clip_c=3.0", "grpo.num_epochs_per_step=2"),
    "kl_in_reward": (KL, IN_REWARD),
    "kl_in_loss": (KL, "loss_fn.use_on_policy_kl_approximation=true"),
    "token": ("loss_fn.correction={type: token}",),
    "sequence": (TWO_STEPS, "loss_fn.correction={type: sequence}"),
    "icepop": (TWO_STEPS, "loss_fn.correction={type: icepop}"),
    "sequence_mask": (TWO_STEPS, "loss_fn.correction={type: sequence_mask, low: 0.9, high: 1.1}"),
}


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_letters_model(tmp_path_factory.mktemp("letters"))


@pytest.fixture
def flipped(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Turns the sign of every advantage round."""
    right = loop.with_advantages

    def wrong(config: GRPOConfig, batch: TokenBatch) -> tuple[TokenBatch, Metrics]:
        batch, metrics = right(config, batch)
        return batch.with_columns(advantages=-batch.token_columns["advantages"]), metrics

    return lambda: monkeypatch.setattr(loop, "with_advantages", wrong)


@pytest.mark.parametrize("member", FAMILY)
def test_a_member_learns_and_with_the_sign_turned_round_does_not(
    member: str, letters: Path, tmp_path: Path, flipped: Callable[[], None]
) -> None:
    code = RIGHT_AND_SHORT if member == "gdpo" else VOWELS
    assert late_reward(letters_run(letters, tmp_path / "right", *FAMILY[member], code=code)) > 0.3
    flipped()
    try:
        wrong = letters_run(letters, tmp_path / "wrong", *FAMILY[member], code=code)
    except RolloutError as error:  # dynamic sampling finds no answer left that is better than another
        assert "got equal rewards" in str(error)
    else:
        assert late_reward(wrong) < 0.1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((LEFT_OUT, "loss_fn.policy_loss=reinforce"), (LEFT_OUT,)),  # RLOO, and GRPO without the deviation
        (("loss_fn.ratio_clip_max=0.2", "grpo.dynamic_sampling=null", TWO_STEPS), (TWO_STEPS,)),
        (
            ("policy.generation.max_new_tokens=1", "loss_fn.ratio_level=sequence", TWO_STEPS),
            ("policy.generation.max_new_tokens=1", TWO_STEPS),
        ),  # a sequence of one token
        (("loss_fn.correction={type: icepop}",), ()),  # sampler and trainer agree here
    ],
)
def test_settings_that_mean_the_same_give_the_same_run(
    one: tuple[str, ...], other: tuple[str, ...], letters: Path, tmp_path: Path
) -> None:
    few = "grpo.max_num_steps=4"
    left = letters_run(letters, tmp_path / "one", few, *one)
    right = letters_run(letters, tmp_path / "other", few, *other)
    for name in ("reward/mean", "grad_norm", "advantages/max"):
        values = [[line[f"train/{name}"] for line in lines] for lines in (left, right)]
        assert values[0] == pytest.approx(values[1], rel=1e-3), name


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ((), 0),
        (("loss_fn.correction={type: token}",), 0),  # the loss has the current ones, which are the old ones
        ((TWO_STEPS, "grpo.skip_uniform_groups=false"), 2),
        ((TWO_STEPS, "grpo.skip_uniform_groups=false", "grpo.num_epochs_per_step=3"), 2),
        (("grpo.num_epochs_per_step=2",), 1),
        ((KL,), 1),
        ((KL, IN_REWARD), 2),
        ((KL, IN_REWARD, "grpo.num_epochs_per_step=2"), 2),
        (("loss_fn.policy_loss=reinforce", "grpo.num_epochs_per_step=2"), 0),  # has no ratio
        (("loss_fn.policy_loss=reinforce", "loss_fn.correction={type: token}", "grpo.num_epochs_per_step=2"), 1),
    ],
)
def test_no_pass_is_made_that_nothing_needs(
    settings: tuple[str, ...], passes: int, letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    logprobs = Policy.logprobs

    def counted(policy: Policy, batch: TokenBatch) -> object:
        calls.append(batch.num_sequences)
        return logprobs(policy, batch)

    monkeypatch.setattr(Policy, "logprobs", counted)
    letters_run(letters, tmp_path, "grpo.max_num_steps=1", *settings)
    assert len(calls) == passes


SOMETIMES = VOWELS.replace("completion: str", "completion: str, ground_truth: str").replace(
    "    return", "    if int(ground_truth) % 2:\n        return 1.0\n    return"
)


def test_dynamic_sampling_fills_a_step_and_counts_what_it_leaves_out(letters: Path, tmp_path: Path) -> None:
    rule = "grpo.dynamic_sampling={max_tries: 20, batch_multiplier: 1.5}"
    for line in letters_run(letters, tmp_path, "grpo.max_num_steps=3", rule, code=SOMETIMES):
        sampled = 6 * (line["train/dynamic_sampling/rounds"] or 0)  # 4 prompts x 1.5
        kept = sampled * (1 - (line["train/dynamic_sampling/share_filtered"] or 0))
        assert kept == pytest.approx(4 + (line["train/dynamic_sampling/surplus_groups"] or 0))
        assert line["train/share_no_spread"] == pytest.approx(line["train/dynamic_sampling/share_filtered"])
    assert all(path.read_text().count("\n") == 24 for path in (tmp_path / "run" / "rollouts").iterdir())


def test_a_step_that_cannot_be_filled_stops_the_run_with_the_counts(letters: Path, tmp_path: Path) -> None:
    always = "def reward(completion: str) -> float:\n    return 1.0\n"
    with pytest.raises(
        RolloutError, match=r"step 1 has 0 of its 4 groups after 3 rounds of 12 prompts in all.*max_tries"
    ):
        letters_run(letters, tmp_path, "grpo.dynamic_sampling.max_tries=3", code=always)


def test_dynamic_sampling_resumes_to_the_same_run(letters: Path, tmp_path: Path) -> None:
    rule = ("grpo.dynamic_sampling.max_tries=20", "checkpointing.enabled=true")
    whole = letters_run(letters, tmp_path / "whole", *rule, "grpo.max_num_steps=4", code=SOMETIMES)
    letters_run(letters, tmp_path / "parts", *rule, "grpo.max_num_steps=2", code=SOMETIMES)
    assert letters_run(letters, tmp_path / "parts", *rule, "grpo.max_num_steps=4", code=SOMETIMES) == whole
