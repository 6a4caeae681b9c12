"""Every benchmark, as a small file or folder with the hub's fields."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from nemo_rl.config.schema.evaluation import ARITHMETIC, BENCHMARK_NAMES, MMLU_LANGUAGES, EvalDataConfig
from nemo_rl.data.chat import PromptFormat
from nemo_rl.data.datasets import benchmarks
from nemo_rl.data.datasets.benchmarks import BENCHMARKS, benchmark_prompt, build_benchmark, last_boxed
from nemo_rl.data.datasets.local import open_local
from nemo_rl.data.datasets.records import Table
from nemo_rl.data.types import Task
from nemo_rl.errors import DataError

CITIES = ["Oslo", "Bern", "Rome", "Kyiv"]
GPQA = {
    "Question": "Which city?\n",
    "Correct Answer": "Rome\n",
    "Incorrect Answer 1": " Oslo\n\n",
    "Incorrect Answer 2": "Bern",
    "Incorrect Answer 3": "Kyiv",
    "Subdomain": "Geography",
    "High-level domain": "Earth",
}
MMMLU = {"Question": "Which city?", **dict(zip("ABCD", CITIES, strict=True)), "Answer": "C", "Subject": "geography"}

RECORDS: dict[str, dict[str, Any]] = {
    "aime2024": {"id": 60, "problem": "1 + 1?", "solution": "...", "answer": "002", "url": "u", "year": "2024"},
    "aime2025": {"question": "1 + 1?", "answer": "2"},
    "math": {
        "problem": "1 + 1?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": "Not $\\boxed{3}$ but $\\boxed{\\frac{4}{2}}$.",
    },
    "math500": {
        "problem": "1 + 1?",
        "solution": "It is $\\boxed{2}$.",
        "answer": "2",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "test/algebra/1.json",
    },
    "gsm8k": {"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
    "gpqa": GPQA,
    "gpqa_diamond": GPQA,
    "mmlu": {"question": "Which city?", "subject": "geography", "choices": CITIES, "answer": 2},
    "mmlu_pro": {
        "question_id": 1,
        "question": "Which city?",
        "options": [*CITIES, "Riga", "Sofia"],
        "answer": "C",
        "answer_index": 2,
        "cot_content": "",
        "src": "x",
        "category": "geography",
    },
    **{f"mmlu_{language}": MMMLU for language in MMLU_LANGUAGES},
}
ANSWERS = {"aime2024": "002", "math": "\\frac{4}{2}"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def written(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def tasks_of(name: str, path: str | None, seed: int = 0, **more: Any) -> list[Task]:
    config = EvalDataConfig(dataset_name=name, path=path, **more)
    dataset = build_benchmark(config, environment="judge", seed=seed)
    return [dataset[index] for index in range(len(dataset))]


def test_every_benchmark_of_the_configuration_is_in_the_registry() -> None:
    assert {*BENCHMARKS, ARITHMETIC} == set(BENCHMARK_NAMES)
    assert set(RECORDS) == set(BENCHMARKS)


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_the_hub_become_tasks(name: str, tmp_path: Path) -> None:
    (task,) = tasks_of(name, written(tmp_path / "records.jsonl", RECORDS[name]))
    assert task.environment == "judge"
    text = task.messages[0]["content"]
    if not BENCHMARKS[name].letters:
        assert (text, task.extra["ground_truth"]) == ("1 + 1?", ANSWERS.get(name, "2"))
        return
    lettered = task.extra["options"]
    assert lettered[task.extra["ground_truth"]] == "Rome"
    assert text == "Which city?\n\n" + "\n".join(f"{letter}) {city}" for letter, city in lettered.items())
    assert str(task.extra["subject"]).casefold() == "geography"


def test_a_folder_laid_out_like_the_hub_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    table = pyarrow.Table.from_pylist([RECORDS["math500"]] * 3)
    pyarrow.parquet.write_table(table, tmp_path / "data" / "test-00000-of-00001.parquet")
    assert len(tasks_of("math500", str(tmp_path))) == 3
    assert len(tasks_of("math500", str(tmp_path), split="test[:2]")) == 2


def test_the_places_on_the_hub_are_read_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def open_hub(path: str, *, split: str, subset: str | None = None) -> Table:
        asked.append((path, split, subset))
        records = ({"question": f"{subset} {number}", "answer": str(number)} for number in range(2))
        return open_local(written(tmp_path / f"{subset}.jsonl", *records))

    monkeypatch.setattr(benchmarks, "open_hub", open_hub)
    tasks = tasks_of("aime2025", None)
    assert asked == [("opencompass/AIME2025", "test", f"AIME2025-{part}") for part in ("I", "II")]
    assert [task.messages[0]["content"] for task in tasks] == [
        "AIME2025-I 0",
        "AIME2025-I 1",
        "AIME2025-II 0",
        "AIME2025-II 1",
    ]
    assert [task.index for task in tasks] == [0, 1, 2, 3]


def test_the_options_of_gpqa_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    path = written(tmp_path / "records.jsonl", *[GPQA] * 60)
    letters = [task.extra["ground_truth"] for task in tasks_of("gpqa_diamond", path)]
    assert letters == [task.extra["ground_truth"] for task in tasks_of("gpqa_diamond", path)]
    assert letters != [task.extra["ground_truth"] for task in tasks_of("gpqa_diamond", path, seed=1)]
    assert all(letters.count(letter) > 5 for letter in "ABCD")


def test_a_choice_is_asked_for_by_its_letters_and_a_problem_as_it_is() -> None:
    assert benchmark_prompt(EvalDataConfig(dataset_name="math500")) == "{}"
    prompt = benchmark_prompt(EvalDataConfig(dataset_name="mmlu_pro"))
    assert "where LETTER is one of ABCDEFGHIJ." in prompt
    assert PromptFormat(prompt).apply(({"role": "user", "content": "Q"},))[0]["content"].endswith("\n\nQ")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_a_file_of_ones_own_needs_only_the_names_of_its_fields(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine.{suffix}"
    if suffix == "csv":
        path.write_text("Question,Answer\n1 + 1?,2\n")
    else:
        written(path, {"Question": "1 + 1?", "Answer": 2})
    for file_format in (None, "csv" if suffix == "csv" else "json"):
        fields: dict[str, Any] = {"problem_key": "Question", "solution_key": "Answer", "file_format": file_format}
        (task,) = tasks_of(str(path), None, **fields)
        assert (task.messages[0]["content"], task.extra["ground_truth"]) == ("1 + 1?", "2")


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("math", {"solution": "It is 2."}, "line 1 has no \\boxed{} in its 'solution'"),
        ("mmlu", {"choices": ["Rome"]}, "has no list of 2 to 10 options in 'choices'"),
        ("mmlu", {"answer": 4}, "says that 4 is right, and it has 4 options"),
        ("mmlu_pro", {"answer": "Rome"}, "says that 'Rome' is right"),
        ("mmlu_pro", {"answer": "AB"}, "says that 'AB' is right"),
        ("mmlu_pro", {"answer": " "}, "says that ' ' is right"),
        ("gsm8k", {"answer": "It is 2."}, "line 1 has no '####' in its 'answer', so no known answer"),
        ("gsm8k", {"answer": "It is 2.\n####"}, "line 1 has an empty answer in its 'answer'"),
        ("math", {"solution": "\\boxed{ }"}, "line 1 has an empty answer in its 'solution'"),
        ("math500", {"answer": ""}, "line 1 has an empty answer in its 'answer'"),
        ("math500", {"answer": None}, "'unique_id']; correct or remove it"),
        ("mmlu_DE-DE", {"B": None}, "line 1 has no 'B'"),
        ("gsm8k", {"question": None}, "line 1 has no 'question'"),
    ],
)
def test_a_malformed_record_is_named_with_its_line(
    name: str, change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "records.jsonl", RECORDS[name] | change)
    with pytest.raises(DataError) as caught:
        tasks_of(name, path)
    assert says in str(caught.value) and str(caught.value).startswith(path)


def test_a_file_of_ones_own_that_lacks_a_field_names_the_setting(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.jsonl", {"Question": "1 + 1?", "Answer": "2"})
    with pytest.raises(DataError, match=r"line 1 has no 'problem', only .*; set data\.problem_key to the field"):
        tasks_of(path, None)
    with pytest.raises(DataError, match=r"line 1 has no 'answer', only .*; set data\.solution_key to the field"):
        tasks_of(path, None, problem_key="Question")


def test_a_box_is_read_with_its_braces_and_an_open_one_not_at_all() -> None:
    assert last_boxed("\\boxed{a} \\boxed{\\sqrt{b^{2}}}") == "\\sqrt{b^{2}}"
    assert last_boxed("\\boxed{a") is None
    assert last_boxed("a}") is None
