"""`explain` answers from the schema alone: type, default, documentation, or the nearest setting."""

import pytest

from nemo_rl.config.explain import explain
from nemo_rl.config.fields import find, walk
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.errors import ConfigError


def test_every_setting_has_a_documentation_and_an_explanation() -> None:
    for path in walk(GRPOConfig):
        key = ".".join(path)
        assert all(setting.info.description for setting in find(GRPOConfig, path)), key
        assert explain(key, GRPOConfig).startswith(f"{key}: "), key


def test_a_setting_shows_type_default_and_documentation() -> None:
    text = explain("policy.generation.temperature", GRPOConfig)
    assert text.startswith("policy.generation.temperature: number > 0, default 1.0\n    Divides the logits")


@pytest.mark.parametrize(
    ("key", "first_line"),
    [
        ("policy.generation.backend", "policy.generation.backend: hf | vllm, required"),
        ("grpo.max_num_epochs", "grpo.max_num_epochs: integer >= 1 | null, default null"),
        ("env.anything.type", "env.anything.type: math | function, required"),
        ("loss_fn.reference_policy_kl_type", 'loss_fn.reference_policy_kl_type: k1 | k2 | k3, default "k3"'),
        ("policy.optimizer.kwargs", "policy.optimizer.kwargs: {NAME: any value}, required"),
        ("policy.generation.stop_strings", "policy.generation.stop_strings: [text, ...] | null, default null"),
    ],
)
def test_types_are_in_the_words_of_yaml(key: str, first_line: str) -> None:
    assert explain(key, GRPOConfig).splitlines()[0] == first_line


def test_a_section_shows_the_fields_of_all_its_variants() -> None:
    text = explain("policy.generation", GRPOConfig)
    assert "  max_batch_size: integer >= 1, default 64" in text
    assert "  vllm_cfg: section" in text
    assert text.count("  temperature: ") == 1
    assert text.index("temperature") < text.index("Samples in the training process") < text.index("max_batch_size")
    assert "  grpo: section" in explain("", GRPOConfig)


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"no setting policy.temperature: did you mean policy.generation.temperature\?"
    ):
        explain("policy.temperature", GRPOConfig)
