"""NeMo RL describes data in two forms; both mean the same here."""

from typing import Any

import pytest

from nemo_rl.config.nemo.translate import translate
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.schema.data import DataConfig
from nemo_rl.config.schema.examples import ExampleDataConfig
from nemo_rl.config.sources import Tree, keys_of
from nemo_rl.errors import ConfigError


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
                "train": {
                    "name": "local",
                    "path": "a.csv",
                    "prompt_key": "input",
                    "answer_key": "output",
                    "prompt_file": "mine.txt",
                    "system_prompt_file": "s.txt",
                },
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
                        {"weight": None, "data": {"name": "DeepScaler"}},
                        {
                            "weight": None,
                            "data": {
                                "name": "local",
                                "path": "a.jsonl",
                                "prompt_key": "input",
                                "answer_key": "output",
                                "prompt_file": "mine.txt",
                            },
                        },
                    ],
                },
                "system_prompt_file": "s.txt",
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


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"train": {"data_path": "a.jsonl", "inptu_key": "q"}}, "unknown key data.train.inptu_key (f.yaml:4): did you"),
        ({"validation": {"dataset_name": "gsm8k", "env_nam": "code"}}, "did you mean data.validation.env_name?"),
        (
            {"train": {"dataset_name": "gsm8k"}, "default": {"promptfile": "x"}},
            "did you mean data.default.prompt_file?",
        ),
        ({"train": [{"dataset_name": "gsm8k"}, {"dataset_name": "gsm8k", "sed": 1}]}, "data.train.1.sed (f.yaml:7)"),
        ({"train": {"dataset_name": "gsm8k", "output_key": "gold"}}, "gsm8k has its own place and columns"),
        ({"train": {"dataset_name": "gsm8k", "subset": "socratic"}}, "data.train.subset = socratic (f.yaml:4) cannot"),
        ({"train": {"dataset_name": "gsm8k"}, "default": {"input_key": "q"}}, "data.default.input_key = q (f.yaml:5)"),
        ({"train": [{"dataset_name": "gsm8k", "output_key": "gold"}]}, "data.train.0.output_key = gold (f.yaml:5)"),
        ({"dataset_name": "gsm8k", "output_key": "gold"}, "data.output_key = gold (f.yaml:3) cannot be translated"),
        ({"dataset_name": "gsm8k", "val_data_path": "a.jsonl"}, "data.val_data_path = a.jsonl (f.yaml:3) cannot"),
        ({"dataset_name": "gsm8k", "val_split": "test"}, "there is no data.val_data_path beside it"),
        ({"dataset_name": "gsm8k", "validation": {"dataset_name": "squad"}}, "keep one of the two forms"),
        (
            {"train": {"dataset_name": "gsm8k"}, "val_data_paths": {"a": "a.jsonl"}},
            "data.dataset_name, which is not set",
        ),
        ({"train": {"data_path": "a.jsonl", "chosen_key": "good"}}, "ResponseDataset has no use for it: leave it out"),
        ({"train": {"data_path": "a.jsonl", "split": "train[:9]"}}, "a file is read as a whole"),
        ({"train": {"data_path": "a.jsonl", "filter_dataset": True}}, "filter the file before the run"),
        ({"validation": {"dataset_name": "gsm8k", "split_validation_size": 9}}, "data for validation are not divided"),
        ({"default": ["x"]}, "it is a section"),
    ],
)
def test_a_key_of_a_data_set_without_a_meaning_is_an_error(data: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        translated({"data": data, "cluster": {"segment_size": None}})
    assert says in str(caught.value)


def test_a_key_of_a_data_set_that_changes_nothing_is_told() -> None:
    train = {"data_path": "a.jsonl", "seed": 7, "download_dir": "d", "subset": "main", "split": "train"}
    values = {"data": {"train": train, "default": {"env_name": "code", "seed": 3}}, "grpo": {"seed": 3}}
    clean, notes = translated(values)
    assert clean["data"]["train"] == {
        "name": "local",
        "path": "a.jsonl",
        "prompt_key": "input",
        "answer_key": "output",
        "environment": "code",
    }
    assert [note.split(" ")[0] for note in notes] == [
        "data.train.seed",
        "data.train.download_dir",
        "data.train.subset",
        "data.default.seed",
    ]
    assert notes[0] == "data.train.seed (f.yaml:4) is ignored: records for validation are drawn by the seed of the run"
    _, (note,) = translated({"data": {"train": {"dataset_name": "squad", "env_name": "math"}}}, "sft")
    assert note.startswith("data.train.env_name (f.yaml:4) is ignored: given answers are judged by nobody")


def test_today_s_keys_may_stand_in_the_description_of_a_data_set() -> None:
    values = {
        "data": {"train": {"dataset_name": "gsm8k", "streaming": True}, "validation": {"name": "squad", "split": "x"}}
    }
    assert translated(values)[0]["data"] == {
        "train": {"name": "GSM8K", "streaming": True},
        "validation": {"name": "squad", "split": "x"},
    }


def test_each_data_set_keeps_the_words_of_its_own() -> None:
    data = {
        "default": {"prompt_file": "all.txt"},
        "train": {"dataset_name": "gsm8k", "repeat": 2, "prompt_file": "mine.txt"},
        "validation": {"dataset_name": "AIME2025", "prompt_file": None},
    }
    assert translated({"data": data})[0]["data"] == {
        "prompt_file": "all.txt",
        "train": {"name": "mixture", "datasets": [{"data": {"name": "GSM8K", "prompt_file": "mine.txt"}}], "repeat": 2},
        "validation": {"name": "AIME2025", "prompt": "{}"},
    }
    data["default"] = {"system_prompt_file": "all.txt"}
    data["validation"]["system_prompt_file"] = None
    with pytest.raises(ConfigError, match="a system prompt cannot be taken back"):
        translated({"data": data})


@pytest.mark.parametrize(
    ("name", "validates"),
    [("DeepScaler", {"name": "AIME2024"}), ("DAPOMath17K", {"name": "DAPOMathAIME2024"})],
)
def test_a_known_name_brings_its_validation(name: str, validates: dict[str, str]) -> None:
    assert translated({"data": {"dataset_name": name}})[0]["data"] == {"train": {"name": name}, "validation": validates}


def test_a_column_that_the_name_says_too_may_be_written() -> None:
    data = {"dataset_name": "openmathinstruct2", "split": "train_5M", "output_key": "generated_solution"}
    assert translated({"data": data}, "sft")[0]["data"]["train"] == {"name": "OpenMathInstruct-2", "split": "train_5M"}
