"""`explain` answers from the schema alone: type, default, documentation, or the nearest setting."""

import pytest

from nemo_rl.config.explain import explain, explain_any
from nemo_rl.config.fields import find, walk
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.schema.registry import COMMANDS
from nemo_rl.errors import ConfigError


def test_every_setting_has_a_documentation_and_an_explanation() -> None:
    for root in COMMANDS.values():
        for path in walk(root):
            key = ".".join(path)
            assert all(setting.info.description for setting in find(root, path)), key
            assert explain(key, root).startswith(f"{key}: "), key


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


def test_a_setting_is_found_in_whichever_command_has_it() -> None:
    assert explain_any("dpo.label_smoothing", COMMANDS) == explain("dpo.label_smoothing", COMMANDS["dpo"])
    assert explain_any("eval.k_value", COMMANDS).startswith("eval.k_value: integer >= 1, default 1\n")
    assert explain_any("cluster.executor", COMMANDS).count("cluster.executor") == 1


def test_a_set_is_shown_as_a_list() -> None:
    first_line = explain("data.roles", COMMANDS["sft"]).splitlines()[0]
    assert first_line == 'data.roles: [system | user | assistant | tool, ...], default ["assistant"]'


def test_what_commands_say_differently_is_said_for_each() -> None:
    text = explain_any("checkpointing.higher_is_better", COMMANDS)
    sampled, given = text.split("\n\n")
    assert sampled.startswith("grpo, ") and "checkpointing.higher_is_better: true | false, default true" in sampled
    assert "sft, dpo" in given.splitlines()[0] and "true | false, default false" in given


def test_the_overview_says_which_commands_have_a_section() -> None:
    lines = explain_any("", COMMANDS).splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("dpo: section"))
    assert "    (dpo)" in lines[place : place + 4]
    assert sum(line.startswith("cluster: section") for line in lines) <= 2


def test_an_unknown_setting_of_one_command_names_its_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no setting dpo\.label_smothing: did you mean dpo\.label_smoothing\?"):
        explain_any("dpo.label_smothing", COMMANDS)
    with pytest.raises(ConfigError, match=r"did you mean generation\.temperature\?|policy\.generation\.temperature"):
        explain_any("generations.temperature", COMMANDS)
