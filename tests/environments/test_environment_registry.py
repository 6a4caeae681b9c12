"""From the configuration's `env` section to environments."""

import asyncio

import pytest

from nemo_rl.config.schema.environments import FunctionEnvironmentConfig, MathEnvironmentConfig
from nemo_rl.data.types import Message
from nemo_rl.environments.registry import build_environments, environment_named
from nemo_rl.errors import ConfigError


def test_every_spec_becomes_the_environment_it_describes() -> None:
    environments = build_environments(
        {
            "sums": MathEnvironmentConfig(type="math", extraction="last_number", reward_correct=3.0),
            "length": FunctionEnvironmentConfig(type="function", path="operator:length_hint"),
        }
    )
    reply = [Message(role="assistant", content="12")]
    rewards = {
        name: asyncio.run(environment.step(reply, {"ground_truth": "12"})).rewards
        for name, environment in environments.items()
    }
    assert rewards == {"sums": {"reward": 3.0}, "length": {"reward": 2.0}}


def test_a_task_that_names_an_unknown_environment_is_told_the_known_ones() -> None:
    environments = build_environments({"sums": MathEnvironmentConfig(type="math", extraction="last_number")})
    assert environment_named(environments, "sums") is environments["sums"]
    with pytest.raises(ConfigError, match=r"'maths'.*only: sums"):
        environment_named(environments, "maths")
