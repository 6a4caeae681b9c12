"""From the `env` section of the configuration to environments."""

from collections.abc import Callable, Mapping

from nemo_rl.config.schema.environments import (
    EnvironmentConfig,
    FunctionEnvironmentConfig,
    MathEnvironmentConfig,
    RewardModelEnvironmentConfig,
)
from nemo_rl.environments.function import FunctionEnvironment
from nemo_rl.environments.math import MathEnvironment
from nemo_rl.environments.reward_model import RewardModelEnvironment
from nemo_rl.errors import ConfigError
from nemo_rl.interfaces import Environment, WorkerHandle

type StartRewardModel = Callable[[str, RewardModelEnvironmentConfig], WorkerHandle]
"""Starts the worker of the environment of that name."""


def build_environments(
    specs: Mapping[str, EnvironmentConfig], start_reward_model: StartRewardModel | None = None
) -> dict[str, Environment]:
    """Make every environment of the configuration, under the same names.

    Args:
        specs: the section.
        start_reward_model: from whoever has an executor; None where no reward model can be started.

    Raises:
        ConfigError: a reward function cannot be imported or called, or a reward model cannot be started.
        ModelError: a reward model cannot be loaded.
    """
    return {name: _build(name, spec, start_reward_model) for name, spec in specs.items()}


def environment_named(environments: Mapping[str, Environment], name: str) -> Environment:
    """Find the environment that a task asks for.

    Raises:
        ConfigError: there is none of that name; the message lists those there are.
    """
    if name not in environments:
        known = ", ".join(sorted(environments)) or "none"
        raise ConfigError(f"a task asks for environment {name!r}, but `env` defines only: {known}")
    return environments[name]


def _build(name: str, spec: EnvironmentConfig, start_reward_model: StartRewardModel | None) -> Environment:
    match spec:
        case MathEnvironmentConfig():
            return MathEnvironment(
                num_workers=spec.num_workers,
                timeout_seconds=spec.timeout_seconds,
                extraction=spec.extraction,
                reward_correct=spec.reward_correct,
                reward_incorrect=spec.reward_incorrect,
            )
        case FunctionEnvironmentConfig():
            return FunctionEnvironment(spec.path, timeout_seconds=spec.timeout_seconds)
        case RewardModelEnvironmentConfig():
            if start_reward_model is None:
                raise ConfigError(f"env.{name} is a reward model, and there is no executor here to start it")
            return RewardModelEnvironment(
                start_reward_model(name, spec),
                max_batch_size=spec.max_batch_size,
                max_wait_seconds=spec.max_wait_seconds,
                scale=spec.reward_scale,
                shift=spec.reward_shift,
                bounds=(spec.reward_min, spec.reward_max),
            )
