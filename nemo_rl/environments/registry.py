"""From the `env` section of the configuration to environments."""

from collections.abc import Mapping

from nemo_rl.config.schema.environments import EnvironmentConfig, FunctionEnvironmentConfig, MathEnvironmentConfig
from nemo_rl.environments.function import FunctionEnvironment
from nemo_rl.environments.math import MathEnvironment
from nemo_rl.errors import ConfigError
from nemo_rl.interfaces import Environment


def build_environments(specs: Mapping[str, EnvironmentConfig]) -> dict[str, Environment]:
    """Make every environment of the configuration, under the same names.

    Raises:
        ConfigError: a reward function cannot be imported or called.
    """
    return {name: _build(spec) for name, spec in specs.items()}


def environment_named(environments: Mapping[str, Environment], name: str) -> Environment:
    """Find the environment that a task asks for.

    Raises:
        ConfigError: there is none of that name; the message lists those there are.
    """
    if name not in environments:
        known = ", ".join(sorted(environments)) or "none"
        raise ConfigError(f"a task asks for environment {name!r}, but `env` defines only: {known}")
    return environments[name]


def _build(spec: EnvironmentConfig) -> Environment:
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
