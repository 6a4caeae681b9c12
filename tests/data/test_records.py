import json
import pickle
from pathlib import Path
from textwrap import dedent

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from datasets import Dataset
from pydantic import TypeAdapter

from nemo_rl.config.schema.data import (
    ArithmeticDataConfig,
    CustomDataConfig,
    DataSpec,
    HubDataConfig,
    LocalDataConfig,
)
from nemo_rl.data.datasets.arithmetic import ArithmeticDataset, unrepeatable_questions
from nemo_rl.data.datasets.records import ItemSequence, RecordDataset, RecordFields, Table
from nemo_rl.data.datasets.registry import build_dataset
from nemo_rl.data.datasets.streams import held
from nemo_rl.data.types import Message, Task, TaskDataset
from nemo_rl.errors import ConfigError, DataError

ROWS = [
    {"problem": "What is 1 + 1?", "solution": "2", "level": 1},
    {"problem": "What is 2 + 3?", "solution": "5", "level": 2},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def local(path: Path, **changes: str) -> TaskDataset:
    keys = {"prompt_key": "problem", "answer_key": "solution", "environment": "quiz", **changes}
    return held(build_dataset(LocalDataConfig(name="local", path=str(path), **keys), "train"), "a test reads")


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_every_kind_of_file_gives_the_same_tasks(tmp_path: Path, suffix: str) -> None:
    file, table = tmp_path / f"rows.{suffix}", pyarrow.Table.from_pylist(ROWS)
    if suffix == "jsonl":
        write_jsonl(file, ROWS)
    elif suffix == "json":
        file.write_text(json.dumps(ROWS))
    elif suffix == "csv":
        pyarrow.csv.write_csv(table, file)
    elif suffix == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(file)
    dataset = local(file)
    assert len(dataset) == 2
    assert dataset[1] == Task(
        messages=({"role": "user", "content": "What is 2 + 3?"},),
        environment="quiz",
        extra={"ground_truth": "5", "level": 2},
        index=1,
    )
    with pytest.raises(IndexError):
        dataset[2]
    assert pickle.loads(pickle.dumps(dataset))[0] == dataset[0]


@pytest.mark.parametrize("answer", ["", " ", "\n"])
def test_a_record_without_an_answer_is_refused(tmp_path: Path, answer: str) -> None:
    rows: list[dict[str, object]] = [{"problem": "1 + 1", "solution": 2}, {"problem": "1 + 2", "solution": answer}]
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 has an empty answer in its 'solution'; fill it in"):
        _ = local(write_jsonl(tmp_path / "a.jsonl", rows)).fingerprint


def test_no_progress_bar_shows_while_a_file_is_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("problem,solution\n1 + 1,2\n")
    assert len(local(tmp_path / "a.csv")) == 1
    assert "Generating" not in capfd.readouterr().err


def test_a_prompt_may_be_a_conversation(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Count."}, {"role": "user", "content": "1 + 1"}]
    dataset = local(write_jsonl(tmp_path / "a.jsonl", [{"problem": turns, "solution": 2}]))
    assert dataset[0].messages == tuple(turns)
    assert dataset[0].extra == {"ground_truth": "2"}


def test_malformed_lines_name_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"problem": "p", "solution": "1"}\n\n{"problem": "p", \n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3 is not JSON"):
        local(file)
    file.write_text('{"problem": "p", "solution": "1"}\n[1, 2]\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 is not a JSON object"):
        local(file)
    file.write_text('{"problem": "p", "solution": "1"}\n\n{"problem": "q"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3 has no 'solution', only \['problem'\].*answer_key"):
        local(file)
    file.write_bytes(b'{"problem": "p\xff", "solution": "1"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 1 is not JSON in UTF-8"):
        local(file)


@pytest.mark.parametrize("prompt", ["", 7, [], [{"role": "user"}]])
def test_a_prompt_that_is_neither_text_nor_messages_is_refused(tmp_path: Path, prompt: object) -> None:
    with pytest.raises(DataError, match="neither text nor a list of messages"):
        local(write_jsonl(tmp_path / "a.jsonl", [{"problem": prompt, "solution": "1"}]))


def test_missing_empty_unreadable_and_unknown_files_are_each_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        local(tmp_path / "none.jsonl")
    empty, broken, unknown = tmp_path / "empty.jsonl", tmp_path / "broken.parquet", tmp_path / "a.xlsx"
    for file in (empty, broken, unknown):
        file.write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        local(empty)
    with pytest.raises(DataError, match=r"broken\.parquet .*cannot be read"):
        local(broken)
    with pytest.raises(DataError, match=r"a\.xlsx is of an unknown kind; use \.jsonl"):
        local(unknown)
    with pytest.raises(DataError, match=r"has no 'question', only \['level', 'problem', 'solution'\]"):
        local(write_jsonl(tmp_path / "a.jsonl", ROWS), prompt_key="question")


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_fingerprint_follows_the_contents(tmp_path: Path, suffix: str) -> None:
    def fingerprint(name: str, rows: list[dict[str, object]]) -> str:
        return local(write_jsonl(tmp_path / f"{name}.{suffix}", rows)).fingerprint

    assert fingerprint("a", ROWS) == fingerprint("b", ROWS)
    assert fingerprint("a", ROWS) != fingerprint("c", [ROWS[0], {**ROWS[1], "solution": "6"}])


class Answer:
    """Shows itself with its address."""


def test_a_fingerprint_depends_on_no_address_and_no_order_of_a_set() -> None:
    def fingerprints(accepted: set[int]) -> tuple[str, str]:
        extra = {"accepted": accepted, "by_place": {(0, 1): [Answer()], (1, 2): None}}
        message: Message = {"role": "user", "content": "p"}
        records = [{"problem": "p", "solution": "1", **extra}]
        return (
            ItemSequence([Task((message,), "math", extra)], source="s").fingerprint,
            RecordDataset(Table(records, "s"), RecordFields("problem", "solution", "math")).fingerprint,
        )

    one, other = {0, 8}, {8, 0}
    assert list(one) != list(other), "equal sets that differ in their order, as sets of texts do between processes"
    assert fingerprints(one) == fingerprints(other)


def test_a_fingerprint_follows_every_part_of_a_task() -> None:
    def fingerprint(content: str = "p", environment: str = "math", **extra: object) -> str:
        message: Message = {"role": "user", "content": content}
        return ItemSequence([Task((message,), environment, extra)], source="s").fingerprint

    variants = [
        fingerprint(),
        fingerprint("q"),
        fingerprint("at 0x1"),
        fingerprint("at 0x2"),
        fingerprint(environment="code"),
        fingerprint(a=1),
        fingerprint(a="1"),
        fingerprint(a={"b": 1}),
        fingerprint(a={"b": 2}),
        fingerprint(a={1, 2}),
        fingerprint(a=[1, 2]),
        fingerprint(a=[2, 1]),
    ]
    assert len(set(variants)) == len(variants)
    assert fingerprint(a=1, b=2) == fingerprint(b=2, a=1)


def test_a_folder_in_hub_format_loads_by_split_and_slice(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "train-00000-of-00001.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[1:]), folder / "test-00000-of-00001.parquet")

    def hub(split: str) -> TaskDataset:
        spec = HubDataConfig(
            name="hub", path=str(folder), split=split, prompt_key="problem", answer_key="solution", environment="math"
        )
        return held(build_dataset(spec, "train"), "a test reads")

    assert [len(hub(split)) for split in ("train", "test", "train[:50%]")] == [2, 1, 1]
    assert hub("test")[0].extra == {"ground_truth": "5", "level": 2}
    with pytest.raises(DataError, match=r"split 'dev'.*cannot be read"):
        hub("dev")


def test_a_subset_of_a_hub_data_set_is_chosen_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    for subset, rows in (("easy", ROWS[:1]), ("all", ROWS)):
        (folder / subset).mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / subset / "train.parquet")
    configs = [{"config_name": name, "data_files": f"{name}/train.parquet"} for name in ("easy", "all")]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")

    def hub(subset: str | None) -> TaskDataset:
        fields = {"prompt_key": "problem", "answer_key": "solution"}
        spec = HubDataConfig(name="hub", path=str(folder), subset=subset, **fields)
        return held(build_dataset(spec, "train"), "a test reads")

    assert [len(hub(subset)) for subset in ("easy", "all")] == [1, 2]
    with pytest.raises(DataError, match=r"hub \(subset 'hard'\).*cannot be read.*'easy', 'all'"):
        hub("hard")
    with pytest.raises(DataError, match=r"Config name is missing.*'easy', 'all'"):
        hub(None)


def test_arithmetic_specs_give_disjoint_splits_and_keep_the_held_out_problems_out() -> None:
    spec = ArithmeticDataConfig(name="arithmetic", num_samples=500, seed=2, environment="sums")
    test = build_dataset(spec, "test")
    train = build_dataset(spec, "train", held_out=test)
    assert isinstance(test, ArithmeticDataset)
    asked = {train[index].messages[0]["content"] for index in range(len(train))}
    assert not asked & unrepeatable_questions(test)
    assert train[0].environment == "sums"
    assert [train[index] for index in range(9)] != [test[index] for index in range(9)]


def test_a_data_set_of_ones_own_is_called_by_import_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        dedent("""
            from nemo_rl.data.types import Task

            def build(number):
                return [Task(({"role": "user", "content": str(i)},), "mine") for i in range(number)]

            def wrong():
                return ["a"]

            def broken():
                raise RuntimeError("no data today")
            """)
    )

    def custom(name: str, **kwargs: int) -> TaskDataset:
        spec = CustomDataConfig(name="custom", path=f"{file}:{name}", kwargs=dict(kwargs))
        return held(build_dataset(spec, "train"), "a test reads")

    dataset = custom("build", number=3)
    assert [dataset[index].index for index in range(len(dataset))] == [0, 1, 2]
    assert dataset[2].environment == "mine"
    assert dataset.fingerprint != custom("build", number=4).fingerprint
    with pytest.raises(DataError, match="build is empty"):
        custom("build", number=0)
    with pytest.raises(DataError, match="must return a sequence of Task"):
        custom("wrong")
    with pytest.raises(DataError, match="raised RuntimeError: no data today"):
        custom("broken")
    with pytest.raises(ConfigError, match=r"data set .*mine.py:missing' does not exist: .* defines no function"):
        custom("missing")


def test_problems_for_several_environments_mix(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    quiz = {
        "name": "local",
        "path": str(file),
        "prompt_key": "problem",
        "answer_key": "solution",
        "environment": "quiz",
    }
    spec = TypeAdapter(DataSpec).validate_python(
        {
            "name": "mixture",
            "datasets": [{"weight": 2, "data": quiz}, {"data": {"name": "arithmetic", "num_samples": 3}}],
        }
    )
    mixed = build_dataset(spec, "train")
    assert [mixed[index].environment for index in range(len(mixed))].count("quiz") == 6
    assert [mixed[index].environment for index in range(len(mixed))].count("math") == 3
    assert [mixed[index].index for index in range(len(mixed))] == list(range(9))
