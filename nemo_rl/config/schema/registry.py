"""The configuration of each training command."""

from collections.abc import Mapping

from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.schema.preference import DPOConfig
from nemo_rl.config.schema.reward_model import RMConfig
from nemo_rl.config.schema.run import RunConfig
from nemo_rl.config.schema.sft import SFTConfig

RUNS: Mapping[str, type[RunConfig]] = {
    config.algorithm: config for config in (GRPOConfig, SFTConfig, DPOConfig, RMConfig)
}
"""By the name of the command, which is also that of the section with the loop."""
