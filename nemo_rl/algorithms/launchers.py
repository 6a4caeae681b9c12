"""Which algorithm a configuration is for."""

from collections.abc import Sequence
from typing import cast

from nemo_rl.algorithms.launch import launch_grpo
from nemo_rl.algorithms.launch_distillation import launch_distillation
from nemo_rl.algorithms.launch_examples import (
    launch_offline_distillation,
    launch_preference,
    launch_rm,
    launch_sft,
)
from nemo_rl.algorithms.launch_ppo import launch_ppo
from nemo_rl.algorithms.outcome import Outcome
from nemo_rl.config.load import LoadedConfig
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.schema.distillation import DistillationConfig, OfflineDistillationConfig
from nemo_rl.config.schema.ppo import PPOConfig
from nemo_rl.config.schema.preference import DPOConfig
from nemo_rl.config.schema.reward_model import RMConfig
from nemo_rl.config.schema.run import RunConfig
from nemo_rl.config.schema.sft import SFTConfig
from nemo_rl.errors import ConfigError


def launch(loaded: LoadedConfig[RunConfig], command: Sequence[str] = ()) -> Outcome:
    """Run what the configuration is for; see `launch_grpo`."""
    match loaded.config:
        case GRPOConfig():
            return launch_grpo(cast(LoadedConfig[GRPOConfig], loaded), command)
        case PPOConfig():
            return launch_ppo(cast(LoadedConfig[PPOConfig], loaded), command)
        case SFTConfig():
            return launch_sft(cast(LoadedConfig[SFTConfig], loaded), command)
        case DPOConfig():
            return launch_preference(cast(LoadedConfig[DPOConfig], loaded), command)
        case RMConfig():
            return launch_rm(cast(LoadedConfig[RMConfig], loaded), command)
        case DistillationConfig():
            return launch_distillation(cast(LoadedConfig[DistillationConfig], loaded), command)
        case OfflineDistillationConfig():
            return launch_offline_distillation(cast(LoadedConfig[OfflineDistillationConfig], loaded), command)
        case other:
            raise ConfigError(f"{other.algorithm} has no launcher")
