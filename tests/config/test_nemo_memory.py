"""The keys of NeMo RL that save memory, today's and those of earlier versions."""

from pathlib import Path

from nemo_rl.config.load import LoadedConfig, load_config
from nemo_rl.config.schema.algorithms import GRPOConfig

FILE = Path(__file__).parent / "nemo" / "grpo_v03.yaml"
KEYS = ("policy.dtensor_cfg.cpu_offload", "policy.dtensor_cfg.activation_checkpointing")


def load(*overrides: str) -> LoadedConfig[GRPOConfig]:
    return load_config(FILE, overrides, GRPOConfig)


def test_what_saves_memory_is_kept() -> None:
    loaded = load(*(f"{key}=true" for key in KEYS), "+policy.offload_optimizer_for_logprob=true")
    spread = loaded.config.policy.dtensor_cfg
    assert (spread.cpu_offload, spread.activation_checkpointing) == (True, True)
    assert loaded.config.policy.offload_optimizer_for_logprob
    assert not any("offload" in note or "checkpointing" in note for note in loaded.notes)


def test_the_keys_of_earlier_versions_stand_in_dtensor_cfg_now() -> None:
    old = ("+policy.fsdp_offload_enabled=true", "+policy.activation_checkpointing_enabled=true")
    loaded = load(*old, *(f"{key}=false" for key in KEYS))
    spread = loaded.config.policy.dtensor_cfg.model_dump(exclude_defaults=True)
    assert spread == {"cpu_offload": True, "activation_checkpointing": True}
    assert not any("offload" in note or "checkpointing" in note for note in loaded.notes)
