"""NeMo RL's switches of the GRPO family are choices here."""

from typing import Any

import pytest

from nemo_rl.config.nemo.translate import translate
from nemo_rl.config.schema.algorithms import GRPOConfig, GRPOLoopConfig
from nemo_rl.config.schema.loss import LossConfig
from nemo_rl.config.sources import Tree, keys_of


def translated(values: dict[str, Any]) -> dict[str, Any]:
    tree = Tree({**values, "cluster": {"segment_size": None}}, dict.fromkeys(keys_of(values), "f.yaml:1"))
    translate(tree, GRPOConfig, "grpo")
    return tree.values


@pytest.mark.parametrize(
    ("old", "clean"),
    [
        (
            {"grpo": {"use_dynamic_sampling": True, "batch_multiplier": 3, "dynamic_sampling_max_gen_batches": 7}},
            {"grpo": {"dynamic_sampling": {"max_tries": 7, "batch_multiplier": 3}}},
        ),
        (
            {"grpo": {"reward_scaling": {"enabled": True, "target_min": -1.0}, "use_dynamic_sampling": False}},
            {"grpo": {"reward_scaling": {"target_min": -1.0}}},
        ),
        (
            {"grpo": {"reward_shaping": {"enabled": True, "overlong_buffer_length": 4, "max_response_length": 9}}},
            {"grpo": {"reward_shaping": {"overlong_buffer_length": 4, "max_response_length": 9}}},
        ),
        (
            {"grpo": {"normalize_rewards": False, "val_batch_size": 1}},
            {"grpo": {"adv_estimator": {"name": "grpo", "normalize_rewards": False}}},
        ),
        (
            {
                "grpo": {
                    "adv_estimator": {"name": "reinforce_plus_plus", "normalize_rewards": True, "minus_baseline": True}
                }
            },
            {"grpo": {"adv_estimator": {"name": "reinforce_plus_plus", "minus_baseline": True}}},
        ),
        (
            {"loss_fn": {"sequence_level_importance_ratios": True, "token_level_loss": False}},
            {"loss_fn": {"ratio_level": "sequence", "reduction": "sequence_mean"}},
        ),
        ({"loss_fn": {"disable_ppo_ratio": True}}, {"loss_fn": {"policy_loss": "reinforce"}}),
        ({"loss_fn": {"use_cispo": True}}, {"loss_fn": {"policy_loss": "cispo"}}),
        ({"loss_fn": {"use_kl_in_reward": True}}, {"loss_fn": {"reference_policy_kl_place": "reward"}}),
        (
            {
                "loss_fn": {
                    "use_importance_sampling_correction": True,
                    "truncated_importance_sampling_type": "seq-mask-tis",
                    "truncated_importance_sampling_ratio": 1.002,
                    "truncated_importance_sampling_ratio_min": 0.999,
                }
            },
            {"loss_fn": {"correction": {"type": "sequence_mask", "low": 0.999, "high": 1.002}}},
        ),
        (
            {"loss_fn": {"use_importance_sampling_correction": True, "sequence_level_importance_ratios": True}},
            {"loss_fn": {"correction": {"type": "sequence", "high": 1e9}, "ratio_level": "sequence"}},
        ),
    ],
)
def test_the_switches_of_the_family_become_choices(old: dict[str, Any], clean: dict[str, Any]) -> None:
    assert translated(old) == clean
    if "grpo" in clean:
        GRPOLoopConfig.model_validate(clean["grpo"])
    else:
        LossConfig.model_validate(clean["loss_fn"])
