"""Every data set that is known by name, as a small folder with the hub's files and columns."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from nemo_rl.config.schema.data import BuiltinDataConfig
from nemo_rl.data.datasets.builtin import BUILTIN
from nemo_rl.data.datasets.registry import build_chats, build_dataset, build_pairs
from nemo_rl.errors import DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def says(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def tree(key: str, parent: str | None, role: str, text: str, *, deleted: bool = False) -> dict[str, Any]:
    return {"message_id": key, "parent_id": parent, "role": role, "text": text, "deleted": deleted, "lang": "en"}


ROWS: dict[str, list[dict[str, Any]]] = {
    "OpenMathInstruct-2": [
        {
            "problem": "1 + 1?",
            "generated_solution": "It is \\boxed{2}.",
            "expected_answer": "2",
            "problem_source": "augmented_math",
        }
    ],
    "DeepScaler": [{"problem": "1 + 1?", "answer": "2", "solution": "It is \\boxed{2}."}],
    "DAPOMath17K": [
        {
            "data_source": "math_dapo",
            "prompt": [user("Solve. 1 + 1?")],
            "ability": "MATH",
            "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "a"},
        }
    ],
    "GSM8K": [{"question": "Ann has 1 and gets 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}],
    "NuminaMath": [
        {"problem": "Prove it.", "solution": "Clear.", "answer": "proof", "source": "olympiads"},
        {"problem": "1 + 1?", "solution": "It is \\boxed{2}.", "answer": "2", "source": "cn_k12"},
    ],
    "OpenR1-Math-220k": [
        {
            "problem": "1 + 1?",
            "solution": "\\boxed{2}",
            "answer": "2",
            "uuid": "a",
            "messages": [user("1 + 1?"), says("<think>\nEasy.\n</think>\n\n2")],
        }
    ],
    "squad": [
        {
            "id": "a",
            "title": "Ann",
            "context": "Ann lives in Rome.",
            "question": "Where does Ann live?",
            "answers": {"text": ["Rome", "in Rome"], "answer_start": [13, 10]},
        }
    ],
    "open_assistant": [
        tree("1", None, "prompter", "Hi"),
        tree("2", "1", "assistant", "Hello!"),
        tree("3", "1", "assistant", "Hm."),
        tree("4", "2", "prompter", "How are you?"),
        tree("5", "4", "assistant", "Fine."),
        tree("6", "2", "prompter", "Nobody answers this."),
        tree("7", "1", "assistant", "Spam", deleted=True),
        tree("8", None, "prompter", "Alone"),
    ],
    "tulu3_sft_mixture": [{"id": "a", "messages": [user("1 + 1?"), says("2")], "source": "ai2-adapt-dev/x"}],
    "tulu3_preference": [
        {
            "id": "a",
            "source": "x",
            "prompt": "1 + 1?",
            "chosen": [user("1 + 1?"), says("2")],
            "rejected": [user("1 + 1?"), says("3")],
        }
    ],
    "HelpSteer3": [
        {
            "domain": "stem",
            "language": "english",
            "context": [user("1 + 1?")],
            "response1": "3",
            "response2": "2",
            "overall_preference": score,
        }
        for score in (2, 0)
    ],
}


def spec(name: str, folder: Path, **settings: str) -> BuiltinDataConfig:
    folder.mkdir(exist_ok=True)
    table = pyarrow.Table.from_pylist(ROWS[name])
    split = BUILTIN[name].splits["train"]
    pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    files = [{"split": split, "path": f"{split}-*"}]
    (folder / "README.md").write_text(
        f"---\nconfigs: {json.dumps([{'config_name': 'own', 'data_files': files}])}\n---\n"
    )
    return BuiltinDataConfig(name=name, path=str(folder), **settings)


PROBLEMS = {
    "OpenMathInstruct-2": ("1 + 1?", "2"),
    "DeepScaler": ("1 + 1?", "2"),
    "DAPOMath17K": ("Solve. 1 + 1?", "2"),
    "GSM8K": ("Ann has 1 and gets 1?", "2"),
    "NuminaMath": ("1 + 1?", "2"),
    "OpenR1-Math-220k": ("1 + 1?", "2"),
    "squad": ("Where does Ann live?", "Rome"),
}

CHATS = {
    "OpenMathInstruct-2": [[user("1 + 1?"), says("It is \\boxed{2}.")]],
    "DeepScaler": [[user("1 + 1?"), says("It is \\boxed{2}.")]],
    "GSM8K": [[user("Ann has 1 and gets 1?"), says("1 + 1 = <<1+1=2>>2\n#### 2")]],
    "NuminaMath": [[user("Prove it."), says("Clear.")], [user("1 + 1?"), says("It is \\boxed{2}.")]],
    "OpenR1-Math-220k": [[user("1 + 1?"), says("<think>\nEasy.\n</think>\n\n2")]],
    "squad": [[{"role": "system", "content": "Ann lives in Rome."}, user("Where does Ann live?"), says("Rome")]],
    "open_assistant": [
        [user("Hi"), says("Hello!"), user("How are you?"), says("Fine.")],
        [user("Hi"), says("Hm.")],
    ],
    "tulu3_sft_mixture": [[user("1 + 1?"), says("2")]],
}


def test_every_name_has_a_test_for_each_of_its_uses() -> None:
    assert set(BUILTIN) == set(ROWS)
    assert set(PROBLEMS) == {name for name, known in BUILTIN.items() if known.problems}
    assert set(CHATS) == {name for name, known in BUILTIN.items() if known.chats}
    assert {"tulu3_preference", "HelpSteer3"} == {name for name, known in BUILTIN.items() if known.pairs}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_are_read_from_the_hubs_columns(name: str, tmp_path: Path) -> None:
    dataset = build_dataset(spec(name, tmp_path / "hub", environment="quiz"), "train")
    question, answer = PROBLEMS[name]
    assert len(dataset) == 1
    assert dataset[0].messages == (user(question),)
    assert dataset[0].extra["ground_truth"] == answer
    assert dataset[0].environment == "quiz"


@pytest.mark.parametrize("name", CHATS)
def test_conversations_are_read_from_the_hubs_columns(name: str, tmp_path: Path) -> None:
    dataset = build_chats(spec(name, tmp_path / "hub"), "train")
    assert [list(dataset[index].messages) for index in range(len(dataset))] == CHATS[name]


@pytest.mark.parametrize(("name", "margin"), [("tulu3_preference", 0.0), ("HelpSteer3", 2.0)])
def test_pairs_are_read_from_the_hubs_columns(name: str, margin: float, tmp_path: Path) -> None:
    dataset = build_pairs(spec(name, tmp_path / "hub"), "train")
    assert len(dataset) == 1
    pair = dataset[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == ((user("1 + 1?"),), (says("2"),), (says("3"),))
    assert pair.margin == margin


def test_a_name_without_that_use_or_split_says_what_to_take(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"HelpSteer3 holds no conversations; use one of OpenMathInstruct-2, "):
        build_chats(spec("HelpSteer3", tmp_path / "a"), "train")
    with pytest.raises(DataError, match=r"GSM8K holds no pairs of answers; use one of tulu3_preference, HelpSteer3"):
        build_pairs(spec("GSM8K", tmp_path / "b"), "train")
    with pytest.raises(DataError, match=r"DeepScaler has no validation split; set its split"):
        build_dataset(spec("DeepScaler", tmp_path / "c"), "validation")
    chosen = build_dataset(spec("DeepScaler", tmp_path / "c", split="train[:1]"), "validation")
    assert len(chosen) == 1
