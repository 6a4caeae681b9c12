"""The configuration of each command."""

from collections.abc import Mapping

from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.schema.base import CommandConfig
from nemo_rl.config.schema.distillation import DistillationConfig, OfflineDistillationConfig
from nemo_rl.config.schema.evaluation import EvalConfig
from nemo_rl.config.schema.ppo import PPOConfig
from nemo_rl.config.schema.preference import DPOConfig
from nemo_rl.config.schema.reward_model import RMConfig
from nemo_rl.config.schema.run import RunConfig
from nemo_rl.config.schema.sft import SFTConfig

_TRAINING = (
    *(GRPOConfig, PPOConfig, SFTConfig, DPOConfig, RMConfig),
    *(DistillationConfig, OfflineDistillationConfig),
)

RUNS: Mapping[str, type[RunConfig]] = {config.algorithm: config for config in _TRAINING}
"""By the name of the command, which is also that of the section with the loop."""

COMMANDS: Mapping[str, type[CommandConfig]] = {**RUNS, "eval": EvalConfig}
"""Training and evaluation, by the name of the command."""
