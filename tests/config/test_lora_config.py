"""The section `lora_cfg`: what its patterns mean, and what cannot be."""

from pathlib import Path

import pytest
import yaml

from nemo_rl.config.load import load_config
from nemo_rl.config.migrate import migrate
from nemo_rl.config.schema.lora import LoRAConfig
from nemo_rl.config.schema.registry import RUNS
from nemo_rl.errors import ConfigError

NEMO = Path(__file__).parent / "nemo" / "grpo_v03.yaml"
LORA = "policy.dtensor_cfg.lora_cfg"


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("q_proj", True),
        ("self_attn.q_proj", True),
        ("model.layers.1.self_attn.q_proj", True),
        ("*_proj", True),
        ("*.layers.1.*", True),
        ("layers.[01].*", True),
        ("proj", False),
        ("attn.q_proj", False),
        ("*.layers.0.*", False),
        ("k_proj", False),
    ],
)
def test_a_pattern_means_a_name_or_its_end(pattern: str, meant: bool) -> None:
    name = "model.layers.1.self_attn.q_proj"
    assert LoRAConfig(target_modules=(pattern,)).adapts(name) == meant
    assert LoRAConfig(exclude_modules=(pattern,)).adapts(name) != meant


@pytest.mark.parametrize(
    ("command", "settings", "says"),
    [
        ("sft", [f"{LORA}.quantize=nf4"], "lora_cfg.quantize is for adapters: set lora_cfg.enabled to true"),
        ("sft", [f"{LORA}.restore_from=somewhere"], "lora_cfg.restore_from is for adapters"),
        ("sft", [f"{LORA}={{match_all_linear: true, target_modules: [q_proj]}}"], "say different things"),
        ("sft", [f"{LORA}.target_module=[q_proj]"], "did you mean policy.dtensor_cfg.lora_cfg.target_modules"),
        (
            "sft",
            [f"{LORA}.enabled=true", "policy.dtensor_cfg.tensor_parallel_size=2"],
            "adapters are neither divided nor staged: set tensor_parallel_size to 1",
        ),
        ("grpo", [f"{LORA}={{enabled: true, dropout: 0.1}}"], "grpo compares probabilities under two sets of weights"),
        ("ppo", [f"{LORA}={{enabled: true, dropout: 0.1}}"], "ppo compares probabilities"),
        ("dpo", [f"{LORA}={{enabled: true, dropout: 0.1}}"], "dpo compares probabilities"),
    ],
)
def test_settings_that_cannot_work_are_refused(command: str, settings: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, settings, RUNS[command])
    assert says in str(error.value)


@pytest.mark.parametrize(("command", "more"), [("sft", []), ("rm", []), ("dpo", ["dpo.preference_loss=simpo"])])
def test_dropout_is_for_runs_that_compare_nothing(command: str, more: list[str]) -> None:
    config = load_config(None, [f"{LORA}={{enabled: true, dropout: 0.1}}", *more], RUNS[command]).config
    assert config.policy.dtensor_cfg.lora_cfg.dropout == 0.1


def test_adapters_are_translated(tmp_path: Path) -> None:
    lora = (
        "{enabled: true, target_modules: [], exclude_modules: [], match_all_linear: true, dim: 128, alpha: 64,"
        " dropout: 0.0, dropout_position: post, lora_A_init: xavier, use_triton: true}"
    )
    path = tmp_path / "lora.yaml"
    path.write_text(f"defaults: {NEMO}\npolicy:\n  dtensor_cfg:\n    lora_cfg: {lora}\n")
    text, notes = migrate(path)
    clean, noted = yaml.safe_load(text), [note.split(" ")[0] for note in notes]
    assert clean["policy"]["dtensor_cfg"]["lora_cfg"] == {
        "enabled": True,
        "target_modules": [],
        "exclude_modules": [],
        "match_all_linear": True,
        "dim": 128,
        "alpha": 64,
        "dropout": 0.0,
        "dropout_position": "post",
        "lora_A_init": "xavier",
    }
    names = [name for name in noted if "lora_cfg" in name]
    assert names == ["policy.dtensor_cfg.lora_cfg.match_all_linear", "policy.dtensor_cfg.lora_cfg.use_triton"]
