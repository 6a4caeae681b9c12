"""Conversations, judged answers and pairs, from files in every layout."""

import json
import pickle
from pathlib import Path
from textwrap import dedent

import pytest
from pydantic import TypeAdapter

from nemo_rl.config.schema.examples import ExampleDataConfig, ExampleSpec
from nemo_rl.data.datasets.registry import build_chats, build_pairs, load_chats, load_pairs
from nemo_rl.data.datasets.streams import ItemStream
from nemo_rl.data.types import Chat, ChatPair, ItemDataset, Message
from nemo_rl.errors import DataError

SPEC: TypeAdapter[ExampleSpec] = TypeAdapter(ExampleSpec)
ASK: Message = {"role": "user", "content": "2 + 2?"}
GOOD: Message = {"role": "assistant", "content": "4"}
BAD: Message = {"role": "assistant", "content": "5"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def local(folder: Path, *records: object, **settings: object) -> ExampleSpec:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return SPEC.validate_python({"name": "local", "path": str(file), **settings})


def chat(folder: Path, record: object, **settings: object) -> Chat:
    return build_chats(local(folder, record, **settings), "train")[0]


def pair(folder: Path, record: object, **settings: object) -> ChatPair:
    return build_pairs(local(folder, record, **settings), "train")[0]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASK, GOOD], "id": 7},
        {"messages": [{**ASK, "tool_calls": None}, {**GOOD, "tool_calls": None}]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": [ASK], "completion": [GOOD]},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        {"input": "2 + 2?", "output": "4"},
    ],
)
def test_usual_layouts_of_conversations_are_recognised(tmp_path: Path, record: object) -> None:
    assert chat(tmp_path, record) == Chat((ASK, GOOD))


def test_other_fields_are_named_in_the_format(tmp_path: Path) -> None:
    record = {"q": {"text": "2 + 2?"}, "answers": [{"text": "4"}], "hint": "Add.", "who": "Be brief."}
    form = {"type": "completion", "prompt_key": "q.text", "completion_key": "answers.0.text", "context_key": "hint"}
    assert chat(tmp_path, record, format=form).messages == ({"role": "user", "content": "2 + 2?\n\nAdd."}, GOOD)
    with_system = chat(tmp_path, record, format={**form, "context_key": None, "system_key": "who"})
    assert with_system.messages == ({"role": "system", "content": "Be brief."}, ASK, GOOD)
    with pytest.raises(DataError, match=r"line 1 has no 'answers\.1\.text'.*set completion_key"):
        chat(tmp_path, record, format={**form, "completion_key": "answers.1.text"})
    with pytest.raises(DataError, match=r"line 1 has the fields \['answers', .*none of the usual sets.*set format"):
        chat(tmp_path, record)


def test_tools_and_tool_calls_are_kept(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    tool = {"type": "function", "function": {"name": "add"}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    made = chat(tmp_path, {"messages": [ASK, turn, {"role": "tool", "content": "4"}, GOOD], "tools": [tool]})
    assert made.tools == (tool,)
    assert made.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}


def test_judged_answers_say_whether_they_are_desirable(tmp_path: Path) -> None:
    labels = [True, False, 1, 0]
    spec = local(tmp_path, *({"prompt": "2 + 2?", "completion": "4", "label": label} for label in labels))
    chats = build_chats(spec, "train", judged=True)
    assert [chats[index].desirable for index in range(4)] == [True, False, True, False]
    with pytest.raises(DataError, match="line 1 has label 'yes', which is neither true nor false"):
        chat(tmp_path, {"prompt": "2 + 2?", "completion": "4", "label": "yes"})
    with pytest.raises(DataError, match=r"line 1 has no 'label'.*set label_key"):
        chat(tmp_path, {"prompt": "2 + 2?", "completion": "4", "label": None})


COMPARED = [
    {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": "2 + 2?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    {"context": "2 + 2?", "completions": [{"rank": 1, "completion": "5"}, {"rank": 0, "completion": [GOOD]}]},
]


@pytest.mark.parametrize("record", COMPARED)
def test_usual_layouts_of_pairs_are_recognised(tmp_path: Path, record: object) -> None:
    assert pair(tmp_path, record) == ChatPair((ASK,), (GOOD,), (BAD,))


def test_a_choice_says_by_how_much_and_ties_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answers = {"context": [ASK], "response1": "4", "response2": "5"}
    spec = local(tmp_path, *({**answers, "overall_preference": score} for score in (-2, 0, 3)))
    with caplog.at_level("INFO"):
        pairs = build_pairs(spec, "train")
    assert len(pairs) == 2
    assert pairs[0] == ChatPair((ASK,), (GOOD,), (BAD,), margin=2.0, index=0)
    assert pairs[1] == ChatPair((ASK,), (BAD,), (GOOD,), margin=3.0, index=1)
    assert "1 of 3 records have no preference and are left out" in caplog.text


def test_answers_of_several_turns_part_where_they_differ(tmp_path: Path) -> None:
    start = [ASK, GOOD, {"role": "user", "content": "Sure?"}]
    record = {"chosen": [*start, GOOD], "rejected": [*start, BAD, ASK, BAD]}
    assert pair(tmp_path, record) == ChatPair(tuple(start), (GOOD,), (BAD, ASK, BAD))
    shorter = pair(tmp_path, {"chosen": start[:2], "rejected": [*start, BAD]})
    assert (shorter.prompt, shorter.chosen) == ((ASK,), (GOOD,))
    margin = {"type": "pair", "margin_key": "score"}
    assert pair(tmp_path, {**COMPARED[0], "score": 0.5}, format=margin).margin == 0.5


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "4"}, "line 1 has the same chosen and rejected answer"),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": " "}, "line 1 has an empty assistant message"),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": None}, "line 1 has no 'rejected'"),
        ({"prompt": "", "chosen": "4", "rejected": "5"}, "line 1 has a prompt that is neither text nor"),
        (
            {"chosen": [ASK, GOOD], "rejected": [{**ASK, "content": "1?"}, BAD]},
            "line 1 does not hold two answers .* to one prompt",
        ),
        ({"context": [ASK], "completions": [{"rank": 0, "completion": "4"}]}, "line 1 has no two answers of different"),
        (
            {"context": [ASK], "completions": [{"rank": 1, "completion": text} for text in "45"]},
            "line 1 has no two answers of different rank",
        ),
        ({"prompt": "2 + 2?", "completion": "4"}, "none of the usual sets .*chosen, rejected"),
    ],
)
def test_a_pair_without_a_preference_names_file_and_line(tmp_path: Path, record: object, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        pair(tmp_path, record)
    assert "rows.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"messages": [ASK, {**GOOD, "content": ""}]}, "line 1 has an empty assistant message"),
        ({"messages": [ASK]}, "line 1 has no assistant message"),
        ({"messages": "2 + 2?"}, "line 1 has 'messages' that is not a list of messages"),
        ({"messages": [ASK, {"role": "assistant"}]}, "line 1 has a conversation or an answer that is neither"),
        ({"prompt": "2 + 2?", "completion": ""}, "line 1 has an empty assistant message"),
    ],
)
def test_a_conversation_without_an_answer_names_file_and_line(tmp_path: Path, record: object, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        chat(tmp_path, record)
    assert "rows.jsonl" in str(caught.value)


def test_every_line_is_read_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2 has an empty assistant message"):
        build_chats(local(tmp_path, {"messages": [ASK, GOOD]}, {"messages": [ASK, {**GOOD, "content": ""}]}), "train")


def test_conversations_and_pairs_are_not_taken_for_each_other(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="format pair, which holds pairs of answers"):
        chat(tmp_path, COMPARED[0], format={"type": "pair"})
    with pytest.raises(DataError, match="format messages, which holds conversations"):
        pair(tmp_path, {"messages": [ASK, GOOD]}, format={"type": "messages"})


def asked(dataset: ItemDataset[Chat]) -> list[str]:
    return [dataset[index].messages[0]["content"] for index in range(len(dataset))]


def numbered(folder: Path, name: str, size: int) -> dict[str, object]:
    (folder / name).mkdir()
    rows = [{"prompt": f"{name}{number}", "completion": "yes"} for number in range(size)]
    file = folder / name / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": "local", "path": str(file)}


def test_a_mixture_keeps_its_shares_throughout_and_shows_everything(tmp_path: Path) -> None:
    parts = [
        {"weight": 3, "data": numbered(tmp_path, "a", 12)},
        {"weight": 1, "data": numbered(tmp_path, "b", 3)},
    ]
    mixed = build_chats(SPEC.validate_python({"name": "mixture", "datasets": parts}), "train")
    words = asked(mixed)
    assert len(words) == 16
    assert {f"a{i}" for i in range(12)} | {f"b{i}" for i in range(3)} == set(words)
    assert all(sum(word.startswith("b") for word in words[start : start + 4]) == 1 for start in range(0, 16, 4))
    assert [mixed[index].index for index in range(16)] == list(range(16))
    twice = build_chats(SPEC.validate_python({"name": "mixture", "datasets": parts, "repeat": 2}), "train")
    assert asked(twice) == words * 2
    assert twice.fingerprint != mixed.fingerprint
    assert asked(pickle.loads(pickle.dumps(mixed))) == words
    with pytest.raises(IndexError):
        mixed[16]


@pytest.mark.parametrize(("size", "count"), [(5, 5), (0.25, 5), (0.001, 1)])
def test_a_split_off_validation_set_is_disjoint_and_repeatable(tmp_path: Path, size: float, count: int) -> None:
    data = ExampleDataConfig(train=SPEC.validate_python(numbered(tmp_path, "a", 20)), split_validation_size=size)
    train, validation = load_chats(data, seed=1)
    assert validation is not None
    assert len(validation) == count
    assert sorted(asked(train) + asked(validation)) == sorted(f"a{i}" for i in range(20))
    assert asked(load_chats(data, seed=1)[0]) == asked(train)
    assert asked(load_chats(data, seed=2)[0]) != asked(train)
    with pytest.raises(DataError, match="leaves nothing of the 20 records"):
        load_chats(data.model_copy(update={"split_validation_size": 20}), seed=1)
    with pytest.raises(ValueError, match="validation and split_validation_size are both set"):
        ExampleDataConfig(train=data.train, validation=data.train, split_validation_size=size)


@pytest.mark.parametrize(("size", "count"), [(5, 5), (0.2, 5), (1, 1)])
def test_what_validates_is_drawn_before_anything_is_mixed_or_shown_again(
    tmp_path: Path, size: float, count: int
) -> None:
    parts = [{"weight": 1, "data": numbered(tmp_path, name, length)} for name, length in (("a", 20), ("b", 5))]
    spec = SPEC.validate_python({"name": "mixture", "datasets": parts, "repeat": 3})
    train, validation = load_chats(ExampleDataConfig(train=spec, split_validation_size=size), seed=1)
    assert validation is not None
    learnt, held_out = set(asked(train)), asked(validation)
    assert len(held_out) == len(set(held_out)) == count
    assert not learnt & set(held_out)
    assert learnt | set(held_out) == {f"a{i}" for i in range(20)} | {f"b{i}" for i in range(5)}
    assert sum(word.startswith("b") for word in held_out) == count // 5


def test_arithmetic_is_there_without_a_file() -> None:
    spec = SPEC.validate_python({"name": "arithmetic", "num_samples": 300})
    chats, pairs = build_chats(spec, "train"), build_pairs(spec, "train")
    for index in range(300):
        (question, answer), compared = chats[index].messages, pairs[index]
        assert (question,) == compared.prompt
        assert (answer,) == compared.chosen
        assert 1 <= abs(int(compared.rejected[0]["content"]) - int(answer["content"])) <= 9
        assert int(compared.rejected[0]["content"]) >= 0
    assert pairs[3] == build_pairs(spec, "train")[3]
    train, validation = load_pairs(ExampleDataConfig(train=spec, validation=spec), seed=0)
    assert validation is not None
    assert train.fingerprint != validation.fingerprint


def test_examples_of_ones_own_are_called_by_import_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        dedent("""
            from nemo_rl.data.types import Chat, ChatPair

            ASK, YES, NO = ({"role": role, "content": text} for role, text in
                            [("user", "?"), ("assistant", "yes"), ("assistant", "no")])

            def chats():
                return [Chat((ASK, YES))]

            def pairs():
                return [ChatPair((ASK,), (YES,), (NO,))]
            """)
    )
    chats, pairs = (SPEC.validate_python({"name": "custom", "path": f"{file}:{name}"}) for name in ("chats", "pairs"))
    assert build_chats(chats, "train")[0].messages[1]["content"] == "yes"
    assert build_pairs(pairs, "train")[0].rejected[0]["content"] == "no"
    with pytest.raises(DataError, match="must return a sequence of ChatPair"):
        build_pairs(chats, "train")


def test_every_second_sum_is_wrong_and_marked_so() -> None:
    spec = SPEC.validate_python({"name": "arithmetic", "num_samples": 6})
    judged, right = build_chats(spec, "train", judged=True), build_chats(spec, "train")
    assert not isinstance(judged, ItemStream) and not isinstance(right, ItemStream)
    answers = [(judged[index], right[index]) for index in range(6)]
    assert [one.desirable for one, _ in answers] == [True, False] * 3
    assert all((one.messages == other.messages) == one.desirable for one, other in answers)
    assert all(one.messages[:-1] == other.messages[:-1] for one, other in answers)
    assert judged.fingerprint != right.fingerprint
