"""The configuration of a PPO run: the critic's section, sizes that fit, the plan."""

from pathlib import Path

import pytest

from nemo_rl.config.explain import explain
from nemo_rl.config.fields import find, walk
from nemo_rl.config.load import dump_config, load_config
from nemo_rl.config.plan import render_plan
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.schema.policy import OptimizerConfig
from nemo_rl.config.schema.ppo import PPOConfig
from nemo_rl.errors import ConfigError

SEPARATE = "value.kind=separate"
EXAMPLE = Path(__file__).parents[2] / "examples" / "configs" / "ppo_math_1B.yaml"


def load(*overrides: str) -> PPOConfig:
    return load_config(None, overrides, PPOConfig).config


def test_a_separate_critic_is_like_the_policy_where_nothing_else_is_said() -> None:
    critic = load(SEPARATE, "policy.train_mb_tokens=777").critic
    policy = load("policy.train_mb_tokens=777").policy
    assert critic is not None
    same = {name: getattr(policy, name) for name in type(critic).model_fields if name != "kind"}
    assert {name: getattr(critic, name) for name in same} == same


def test_a_separate_critic_has_settings_of_its_own() -> None:
    own = (
        "value.model_name=elsewhere/critic",
        "value.precision=float32",
        "value.train_global_batch_size=96",
        "value.optimizer={name: torch.optim.SGD, kwargs: {lr: 0.5}}",
        "value.scheduler=[]",
    )
    config = load(SEPARATE, *own)
    critic = config.critic
    assert critic is not None
    assert (critic.model_name, critic.precision, critic.train_global_batch_size) == ("elsewhere/critic", "float32", 96)
    assert critic.optimizer == OptimizerConfig(name="torch.optim.SGD", kwargs={"lr": 0.5})
    assert critic.scheduler == () != config.policy.scheduler
    assert config.policy == load().policy


def test_a_dump_with_a_separate_critic_loads_to_the_same(tmp_path: Path) -> None:
    config = load(SEPARATE, "value.optimizer.kwargs={lr: 1e-5}")
    (tmp_path / "dump.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dump.yaml", (), PPOConfig).config == config


def test_the_recipe_has_the_problems_of_grpo() -> None:
    ppo, grpo = load(), load_config(None, (), GRPOConfig).config
    assert (ppo.data, ppo.env, ppo.policy.model_name) == (grpo.data, grpo.env, grpo.policy.model_name)
    assert ppo.policy.generation == grpo.policy.generation


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["value.optimizer.kwargs.lr=1"], "unknown key value.optimizer"),
        (["value.kind=apart"], "must be one of 'shared', 'separate'"),
        (["ppo.critic_ppo_epochs=3"], "ppo.critic_ppo_epochs = 3 is for a critic of its own"),
        (
            [SEPARATE, "value.train_global_batch_size=100"],
            "value.train_global_batch_size = 100 does not divide the 96",
        ),
        ([SEPARATE, "value.train_global_batch_size=4"], "of whole groups"),
        ([SEPARATE, "value.max_total_sequence_length=64"], "is less than that of the policy, 128"),
        ([SEPARATE, "value.scheduler=[{name: a},{name: b}]"], "chains 2 schedulers"),
        ([SEPARATE, "value.generation={backend: hf}"], "unknown key value.generation"),
        ([SEPARATE, "value.precison=float32"], "did you mean value.precision?"),
        (["ppo.policy_training_start_step=20"], "leaves the policy none of the ppo.max_num_steps = 12 steps"),
        (["ppo.adv_estimator.gae_lambda=1.1"], "must be less than or equal to 1"),
        (["value_loss_fn.cliprange=0"], "must be greater than 0"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(settings: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*settings)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_one_answer_to_a_problem_is_enough() -> None:
    sizes = ("ppo.num_prompts_per_step=6", "ppo.num_generations_per_prompt=1")
    assert load(*sizes, "policy.train_global_batch_size=3").num_rollouts_per_step == 6


@pytest.mark.parametrize(
    ("settings", "on_policy"),
    [([], True), (["ppo.ppo_epochs=2"], False), (["policy.train_global_batch_size=48"], False)],
)
def test_only_a_batch_of_one_optimizer_step_is_on_policy(settings: list[str], on_policy: bool) -> None:
    assert load(*settings).on_policy is on_policy


def test_every_setting_has_a_documentation_and_an_explanation() -> None:
    for path in walk(PPOConfig):
        key = ".".join(path)
        assert all(setting.info.description for setting in find(PPOConfig, path)), key
        assert explain(key, PPOConfig).startswith(f"{key}: "), key


def test_the_plan_counts_the_passes_and_the_critic() -> None:
    shared, separate = (
        render_plan(load("ppo.ppo_epochs=2")),
        render_plan(load(SEPARATE, "ppo.critic_ppo_epochs=3", "policy.precision=bfloat16")),
    )
    assert "2 (96 rollouts each)" in shared and "1 (on-policy)" in separate
    assert "critic                    on the policy's trunk, in the same passes" in shared
    assert "critic                    a model of its own, 3 optimizer steps per step of 96 rollouts each" in separate
    assert "critic's weights          269 MB" in separate and "critic's optimizer moments" in separate
    assert "critic's" not in shared
    unknown = render_plan(load(SEPARATE, "value.model_name=someone/Unheard-Of-3B"))
    assert "someone/Unheard-Of-3B: size unknown" in unknown


def test_the_gpu_recipe_loads_and_has_a_plan() -> None:
    config = load_config(EXAMPLE, (), PPOConfig).config
    assert config.critic is not None and config.critic.optimizer.kwargs["lr"] == 1e-5
    assert "critic's optimizer moments" in render_plan(config)
