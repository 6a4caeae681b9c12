"""Every data set that is known by name, as a small folder with the hub's files and columns."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from nemo_rl.config.schema.data import BuiltinDataConfig, DataConfig
from nemo_rl.config.schema.examples import ExampleDataConfig
from nemo_rl.data.datasets.builtin import BUILTIN
from nemo_rl.data.datasets.pictures import PictureProblems
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


PNG = b"\x89PNG the file as it is"

ROWS: dict[str, list[dict[str, Any]]] = {
    "AIME2024": [{"id": 60, "problem": "1 + 1?", "solution": "Easy.", "answer": "2", "url": "u", "year": "2024"}],
    "AIME2025": [{"question": "1 + 1?", "answer": "2"}],
    "DAPOMathAIME2024": [
        {
            "data_source": "math_dapo",
            "prompt": [user("Solve. 1 + 1?")],
            "ability": "MATH",
            "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": 0},
        }
    ],
    "MATH-500": [
        {
            "problem": "1 + 1?",
            "solution": "It is \\boxed{2}.",
            "answer": "2",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "test/algebra/1.json",
        }
    ],
    "clevr-cogent": [
        {
            "image": {"bytes": PNG, "path": None},
            "problem": "How many cubes are there?",
            "solution": "<answer> 3 </answer>",
        }
    ],
    "geometry3k": [
        {"images": [{"bytes": PNG, "path": None}], "problem": "<image>Find x.", "answer": "3"},
    ],
    "refcoco": [
        {
            "sent_ids": [1, 2],
            "file_name": "COCO_train2014_000000000001_0.jpg",
            "split": "train",
            "sentences": [{"raw": "cat", "sent": "cat", "sent_id": 1, "tokens": ["cat"]}],
            "raw_image_info": json.dumps({"height": 100, "width": 200, "id": 1}),
            "image_path": "coco/train2014/COCO_train2014_000000000001.jpg",
            "bbox": [20.0, 10.0, 100.0, 50.0],
            "captions": ["cat", "the black cat"],
        }
    ],
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


IMAGE_COLUMNS = {
    "clevr-cogent": {"image": datasets.Image()},
    "geometry3k": {"images": datasets.List(datasets.Image())},
}


def spec(name: str, folder: Path, **settings: object) -> BuiltinDataConfig:
    folder.mkdir(exist_ok=True)
    table = pyarrow.Table.from_pylist(ROWS[name])
    if columns := IMAGE_COLUMNS.get(name):  # as the hub's files say it, in the schema's metadata
        found = datasets.Features.from_arrow_schema(table.schema)
        table = table.cast(datasets.Features({**found, **columns}).arrow_schema)
    split = BUILTIN[name].splits["train"]
    pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    files = [{"split": split, "path": f"{split}-*"}]
    (folder / "README.md").write_text(
        f"---\nconfigs: {json.dumps([{'config_name': 'own', 'data_files': files}])}\n---\n"
    )
    return BuiltinDataConfig(name=name, path=str(folder), **settings)


PROBLEMS = {
    "AIME2024": ("1 + 1?", "2"),
    "AIME2025": ("1 + 1?", "2"),
    "DAPOMathAIME2024": ("Solve. 1 + 1?", "2"),
    "MATH-500": ("1 + 1?", "2"),
    "OpenMathInstruct-2": ("1 + 1?", "2"),
    "DeepScaler": ("1 + 1?", "2"),
    "DAPOMath17K": ("Solve. 1 + 1?", "2"),
    "GSM8K": ("Ann has 1 and gets 1?", "2"),
    "NuminaMath": ("1 + 1?", "2"),
    "OpenR1-Math-220k": ("1 + 1?", "2"),
    "squad": ("Ann lives in Rome.\n\nWhere does Ann live?", "Rome"),
}

CHATS = {
    "MATH-500": [[user("1 + 1?"), says("It is \\boxed{2}.")]],
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


LOCATE = (
    "<image>Please give the bounding box of the region that this phrase describes, as [x1, y1, x2, y2] in thousandths "
    "of the image's width and height: the black cat"
)
PICTURES = {
    "clevr-cogent": ("<image>How many cubes are there?", "3"),
    "geometry3k": ("<image>Find x.", "3"),
    "refcoco": (LOCATE, "[100, 100, 500, 500]"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", PICTURES)
def test_images_travel_beside_the_words_that_mark_their_place(name: str, streaming: bool, tmp_path: Path) -> None:
    coco = tmp_path / "images" / "train2014" / "COCO_train2014_000000000001.jpg"
    coco.parent.mkdir(parents=True)
    coco.write_bytes(PNG)
    described = spec(name, tmp_path / "hub", streaming=streaming, image_folder=str(tmp_path / "images"))
    question, answer = PICTURES[name]
    problems, chats = build_dataset(described, "train"), build_chats(described, "train")
    task, chat = (next(one.once()) if streaming else one[0] for one in (problems, chats))
    assert task.messages == (user(question),) and task.extra == {"ground_truth": answer}
    assert chat.messages == (user(question), says(answer))
    assert task.images == chat.images == (PNG,)


def test_an_image_that_is_not_there_and_one_without_a_place_name_the_record(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"record 0 shows an image that is not at \S+000001.jpg; set image_folder"):
        build_dataset(spec("refcoco", tmp_path / "a", image_folder=str(tmp_path)), "train")
    unmarked = PictureProblems("geometry3k", "math")
    with pytest.raises(DataError, match="here has 1 images and 0 places <image> for them"):
        unmarked.read({"images": [PNG], "problem": "Find x.", "answer": "3"}, 0, "here")


def test_problems_with_images_are_refused_where_a_run_is_described() -> None:
    for section in (DataConfig, ExampleDataConfig):
        with pytest.raises(ValueError, match=r"problems of geometry3k show images, and .* trained on text alone"):
            section.model_validate({"train": {"name": "geometry3k"}})


def test_every_name_has_a_test_for_each_of_its_uses() -> None:
    assert set(BUILTIN) == set(ROWS)
    assert set(PROBLEMS) == {name for name, known in BUILTIN.items() if known.problems}
    assert set(CHATS) == {name for name, known in BUILTIN.items() if known.chats}
    assert set(PICTURES) == {name for name, known in BUILTIN.items() if known.pictures}
    assert set(PICTURES) == {name for name in BUILTIN if BuiltinDataConfig(name=name).has_images}
    assert {"tulu3_preference", "HelpSteer3"} == {name for name, known in BUILTIN.items() if known.pairs}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_are_read_from_the_hubs_columns(name: str, tmp_path: Path) -> None:
    dataset = build_dataset(spec(name, tmp_path / "hub", environment="quiz"), "train")
    question, answer = PROBLEMS[name]
    assert len(dataset) == 1
    assert dataset[0].messages == (user(question),)
    assert dataset[0].extra["ground_truth"] == answer
    assert dataset[0].environment == "quiz"


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_are_streamed_alike(name: str, tmp_path: Path) -> None:
    streamed = build_dataset(spec(name, tmp_path / "hub", streaming=True), "train")
    whole = build_dataset(spec(name, tmp_path / "hub"), "train")
    assert [task.messages for task in streamed.once()] == [whole[0].messages]
    assert [task.extra["ground_truth"] for task in streamed.once()] == [PROBLEMS[name][1]]


@pytest.mark.parametrize("name", CHATS)
def test_conversations_are_read_from_the_hubs_columns(name: str, tmp_path: Path) -> None:
    dataset = build_chats(spec(name, tmp_path / "hub"), "train")
    assert [list(dataset[index].messages) for index in range(len(dataset))] == CHATS[name]


@pytest.mark.parametrize(("name", "margin"), [("tulu3_preference", 0.0), ("HelpSteer3", 2.0)])
def test_pairs_are_read_from_the_hubs_columns(name: str, margin: float, tmp_path: Path) -> None:
    dataset = build_pairs(spec(name, tmp_path / "hub"), "train")
    assert len(dataset) == 1
    pair = dataset[0]
    streamed = list(build_pairs(spec(name, tmp_path / "hub", streaming=True), "train").once())
    assert [one.chosen for one in streamed] == [pair.chosen]
    assert (pair.prompt, pair.chosen, pair.rejected) == ((user("1 + 1?"),), (says("2"),), (says("3"),))
    assert pair.margin == margin


def test_a_name_without_that_use_or_split_says_what_to_take(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"HelpSteer3 holds no conversations; use one of MATH-500, OpenMathInstruct-2, "
    ):
        build_chats(spec("HelpSteer3", tmp_path / "a"), "train")
    with pytest.raises(DataError, match=r"GSM8K holds no pairs of answers; use one of tulu3_preference, HelpSteer3"):
        build_pairs(spec("GSM8K", tmp_path / "b"), "train")
    with pytest.raises(DataError, match=r"DeepScaler has no validation split; set its split"):
        build_dataset(spec("DeepScaler", tmp_path / "c"), "validation")
    chosen = build_dataset(spec("DeepScaler", tmp_path / "c", split="train[:1]"), "validation")
    assert len(chosen) == 1
