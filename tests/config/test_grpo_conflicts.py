"""Settings of the GRPO family that exclude each other are refused in one sentence that names both and their place."""

import pytest

from nemo_rl.config.load import load_config
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.errors import ConfigError

KL_IN_REWARD = ("loss_fn.reference_policy_kl_penalty=0.1", "loss_fn.reference_policy_kl_place=reward")
GDPO = "grpo.adv_estimator={name: gdpo}"
REINFORCE_PLUS_PLUS = "grpo.adv_estimator={name: reinforce_plus_plus}"
ONE_ANSWER = "grpo.num_generations_per_prompt=1"
SHAPING = "grpo.reward_shaping={overlong_buffer_length: 4}"

CONFLICTS: dict[tuple[str, ...], str] = {
    ("loss_fn.ratio_clip_c=3.0", "loss_fn.policy_loss=cispo"): "ratio_clip_c bounds the clipped loss",
    ("loss_fn.ratio_level=sequence", "loss_fn.policy_loss=reinforce"): "reinforce has no ratio",
    ("loss_fn.policy_loss=reinforce", "loss_fn.ratio_clip_min=0.1"): "reinforce has no ratio, which ratio_clip_min",
    (*KL_IN_REWARD, "loss_fn.use_on_policy_kl_approximation=true"): "weighs a KL term in the loss",
    ("loss_fn.correction={type: token, low: 2.0}",): "low = 2 is not below high = 2",
    ("loss_fn.correction={type: sequence, low: 3.0}",): "low = 3 is not below high = 2",
    ("loss_fn.correction={type: icepop, high: 0.5}",): "low = 0.5 is not below high = 0.5",
    ("loss_fn.correction={type: sequence_mask, high: 0.9}",): "low = 0.999 is not below high = 0.9",
    ("grpo.reward_scaling={source_min: 1.0}",): "source_min = 1 is not below source_max = 1",
    ("grpo.advantage_clip_low=1.0", "grpo.advantage_clip_high=1.0"): "advantage_clip_low = 1 is not below",
    (ONE_ANSWER,): "no other answer to compare with, which adv_estimator = grpo does",
    (ONE_ANSWER, GDPO): "which adv_estimator = gdpo does",
    (ONE_ANSWER, "grpo.adv_estimator={name: reinforce_plus_plus, minus_baseline: true}"): "without minus_baseline",
    (ONE_ANSWER, REINFORCE_PLUS_PLUS, "grpo.dynamic_sampling={}"): "no group whose rewards differ",
    ("grpo.reward_scaling={}", GDPO): "reward_scaling changes the sum of the named rewards",
    (SHAPING, GDPO): "reward_shaping changes the sum of the named rewards",
    (*KL_IN_REWARD, GDPO): "loss_fn.reference_policy_kl_place = reward changes the sum of the named rewards",
    ("grpo.reward_shaping={overlong_buffer_length: 17}",): "= 17 is more than the longest answer, 16 tokens",
    (
        "grpo.reward_shaping={overlong_buffer_length: 9, max_response_length: 8}",
    ): "= 9 is more than the longest answer, 8 tokens",
}
FINE: tuple[tuple[str, ...], ...] = (
    ("loss_fn.ratio_clip_c=3.0",),
    ("loss_fn.ratio_level=sequence", "loss_fn.policy_loss=cispo"),
    ("loss_fn.use_on_policy_kl_approximation=true", "loss_fn.reference_policy_kl_penalty=0.1"),
    ("grpo.advantage_clip_low=1.0",),
    ("grpo.advantage_clip_low=-1.0", "grpo.advantage_clip_high=1.0"),
    (ONE_ANSWER, REINFORCE_PLUS_PLUS),
    (GDPO, "loss_fn.reference_policy_kl_penalty=0.1"),
    ("loss_fn.reference_policy_kl_place=reward", GDPO),  # without a penalty there is no term
    ("grpo.reward_shaping={overlong_buffer_length: 16}",),
    ("grpo.reward_scaling={target_min: 1.0, target_max: -1.0}",),  # upside down on purpose
)


@pytest.mark.parametrize("settings", CONFLICTS)
def test_settings_that_exclude_each_other_are_one_sentence(settings: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, settings, GRPOConfig)
    message = str(caught.value)
    assert CONFLICTS[settings] in message
    assert "(command line" in message and ": " in message and "\n" not in message


@pytest.mark.parametrize("settings", FINE)
def test_settings_that_only_look_like_it_load(settings: tuple[str, ...]) -> None:
    load_config(None, settings, GRPOConfig)
