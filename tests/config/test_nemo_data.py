"""NeMo RL describes data in two forms; both mean the same here."""

from typing import Any

import pytest

from nemo_rl.config.nemo.translate import translate
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.schema.data import DataConfig
from nemo_rl.config.schema.examples import ExampleDataConfig
from nemo_rl.config.sources import Tree, keys_of


def translated(values: dict[str, Any], algorithm: str = "grpo") -> tuple[dict[str, Any], tuple[str, ...]]:
    tree = Tree(values, {key: f"f.yaml:{line}" for line, key in enumerate(keys_of(values), 1)})
    notes = translate(tree, GRPOConfig, algorithm)
    return tree.values, notes


@pytest.mark.parametrize(
    ("algorithm", "data", "clean"),
    [
        (
            "grpo",
            {"dataset_name": "ResponseDataset", "train_data_path": "a.jsonl", "input_key": "question"},
            {"train": {"name": "local", "path": "a.jsonl", "prompt_key": "question", "answer_key": "output"}},
        ),
        (
            "grpo",
            {"train": {"data_path": "org/set", "split": "test", "env_name": "math"}, "default": {"output_key": "gold"}},
            {
                "train": {
                    "name": "hub",
                    "path": "org/set",
                    "split": "test",
                    "prompt_key": "input",
                    "answer_key": "gold",
                    "environment": "math",
                }
            },
        ),
        (
            "grpo",
            {"train": {"data_path": "a.csv", "prompt_file": "mine.txt", "system_prompt_file": "s.txt"}},
            {
                "train": {"name": "local", "path": "a.csv", "prompt_key": "input", "answer_key": "output"},
                "prompt_file": "mine.txt",
                "system_prompt_file": "s.txt",
            },
        ),
        (
            "grpo",
            {
                "train": [{"dataset_name": "DeepScaler"}, {"data_path": "a.jsonl", "prompt_file": "mine.txt"}],
                "default": {"system_prompt_file": "s.txt"},
            },
            {
                "train": {
                    "name": "mixture",
                    "datasets": [
                        {"weight": None, "data": {"name": "DeepScaler", "system_prompt_file": "s.txt"}},
                        {
                            "weight": None,
                            "data": {
                                "name": "local",
                                "path": "a.jsonl",
                                "prompt_key": "input",
                                "answer_key": "output",
                                "prompt_file": "mine.txt",
                                "system_prompt_file": "s.txt",
                            },
                        },
                    ],
                }
            },
        ),
        (
            "sft",
            {"dataset_name": "openmathinstruct2", "prompt_file": "mine.txt", "system_prompt_file": "s.txt"},
            {
                "train": {"name": "OpenMathInstruct-2"},
                "split_validation_size": 0.05,
                "prompt_file": "mine.txt",
                "system_prompt_file": "s.txt",
            },
        ),
        (
            "dpo",
            {"dataset_name": "Tulu3Preference"},
            {"train": {"name": "tulu3_preference"}, "split_validation_size": 0.05},
        ),
        (
            "dpo",
            {"dataset_name": "PreferenceDataset", "train_data_path": "a.jsonl"},
            {"train": {"name": "local", "path": "a.jsonl", "format": {"type": "ranking"}}},
        ),
        (
            "sft",
            {"dataset_name": "openai_format", "train_data_path": "org/set", "chat_key": "turns", "train_split": "all"},
            {
                "train": {
                    "name": "hub",
                    "path": "org/set",
                    "split": "all",
                    "format": {"type": "messages", "messages_key": "turns"},
                }
            },
        ),
        (
            "sft",
            {"train": {"data_path": "a.jsonl", "split_validation_size": 0.1}, "default": {"output_key": "reply"}},
            {
                "train": {
                    "name": "local",
                    "path": "a.jsonl",
                    "format": {"type": "completion", "prompt_key": "input", "completion_key": "reply"},
                },
                "split_validation_size": 0.1,
            },
        ),
    ],
)
def test_both_forms_of_data_are_understood(algorithm: str, data: dict[str, Any], clean: dict[str, Any]) -> None:
    assert translated({"data": data, "cluster": {"segment_size": None}}, algorithm)[0] == {"data": clean}
    kind = DataConfig if algorithm == "grpo" else ExampleDataConfig
    kind.model_validate(clean)
