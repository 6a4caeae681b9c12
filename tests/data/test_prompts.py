"""Words around the records of one data set, and code of one's own that reads them."""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_rl.config.schema.data import DataSpec
from nemo_rl.config.schema.examples import ExampleDataConfig, ExampleSpec
from nemo_rl.data.chat import PromptFormat
from nemo_rl.data.datasets.arithmetic import ArithmeticDataset
from nemo_rl.data.datasets.registry import build_chats, build_dataset, build_pairs, load_tasks
from nemo_rl.data.datasets.streams import ItemStream, Source
from nemo_rl.data.examples import ChatEncoder
from nemo_rl.data.processors import TaskProcessor
from nemo_rl.data.supervised import prepare_examples
from nemo_rl.data.types import Chat, ChatPair, Task
from nemo_rl.errors import ConfigError, DataError
from tiny_models import embedded_folder

TASKS: TypeAdapter[DataSpec] = TypeAdapter(DataSpec)
EXAMPLES: TypeAdapter[ExampleSpec] = TypeAdapter(ExampleSpec)
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}

CODE = """
from nemo_rl.data.types import Chat, ChatPair, Message, Task

def task(record):
    kind, _, question = record["text"].partition(": ")
    template = "Count in {}." if kind == "count" else None
    asked = Message(role="user", content=question)
    return Task((asked,), kind, {"ground_truth": record["gold"]}, template=template)

def chat(record):
    return Chat((Message(role="user", content=record["text"]), Message(role="assistant", content=record["gold"])))

def pair(record):
    asked = Message(role="user", content=record["text"])
    answers = (Message(role="assistant", content=text) for text in (record["gold"], "no"))
    good, bad = answers
    return ChatPair((asked,), (good,), (bad,))

def nothing(record):
    return None

def tasks(count):
    return [task({"text": f"math: {i}?", "gold": str(i)}) for i in range(count)]
"""


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_folder())


def lines(file: Path, *records: object) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def all_of(source: Source[Any]) -> list[Any]:
    return list(source.once()) if isinstance(source, ItemStream) else [source[i] for i in range(len(source))]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_has_words_of_its_own_and_else_those_of_the_run(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, streaming: bool
) -> None:
    (tmp_path / "think.txt").write_text("Think. {}")
    (tmp_path / "brief.txt").write_text("Be brief.")
    path = lines(tmp_path / "a.jsonl", {"prompt": "2 + 2?", "answer": 4})
    of_the_run = TaskProcessor(tokenizer, PromptFormat("Solve {}", "You solve."))

    def messages(**settings: object) -> list[str]:
        spec = TASKS.validate_python({"name": "local", "path": path, "streaming": streaming, **settings})
        (task,) = all_of(build_dataset(spec, "train"))
        ready = of_the_run(task)
        assert ready is not None
        return [message["content"] for message in ready.messages]

    assert messages() == ["You solve.", "Solve 2 + 2?"]
    assert messages(prompt="Compute {}") == ["You solve.", "Compute 2 + 2?"]
    assert messages(prompt_file=str(tmp_path / "think.txt")) == ["You solve.", "Think. 2 + 2?"]
    assert messages(system_prompt_file=str(tmp_path / "brief.txt")) == ["Be brief.", "Solve 2 + 2?"]
    with pytest.raises(DataError, match=r"cannot read data\.prompt_file = .*gone\.txt: No such file"):
        messages(prompt_file=str(tmp_path / "gone.txt"))
    with pytest.raises(ValueError, match="prompt and prompt_file are both set"):
        messages(prompt="{}", prompt_file="a.txt")


def test_parts_of_a_mixture_keep_their_own_words(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = lines(tmp_path / "a.jsonl", {"prompt": "2 + 2?", "answer": 4})
    plain = {"name": "local", "path": path}
    spec = TASKS.validate_python(
        {"name": "mixture", "datasets": [{"data": {**plain, "prompt": "Compute {}"}}, {"data": plain}]}
    )
    data = build_dataset(spec, "train")
    said = [TaskProcessor(tokenizer)(task).messages[-1]["content"] for task in all_of(data)]
    assert sorted(said) == ["2 + 2?", "Compute 2 + 2?"]
    other = TASKS.validate_python({"name": "mixture", "datasets": [{"data": plain}, {"data": plain}]})
    assert build_dataset(other, "train").fingerprint != data.fingerprint


def test_the_words_of_a_run_surround_the_first_words_of_a_conversation(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "brief.txt").write_text("Be brief.")
    path = lines(tmp_path / "a.jsonl", {"messages": [HI, HELLO, HI, HELLO]})

    def text(run: dict[str, str], own: dict[str, str]) -> str:
        config = {"train": {"name": "local", "path": path, **own}, **run}
        made = prepare_examples(
            ExampleDataConfig.model_validate(config), tokenizer, batch_size=1, max_length=99, seed=0
        )
        (example,) = next(made.loader)
        assert tokenizer.decode(example.token_ids[example.loss_mask]) == "Hello<|im_end|>Hello<|im_end|>"
        return str(tokenizer.decode(example.token_ids))

    said = text({"prompt": "Say {}", "system_prompt_file": str(tmp_path / "brief.txt")}, {})
    assert said.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay Hi<|im_end|>")
    assert said.count("Say Hi") == 1
    assert "Shout Hi" in text({"prompt": "Say {}"}, {"prompt": "Shout {}"})
    lines(tmp_path / "a.jsonl", {"messages": [{"role": "system", "content": "x"}, HI, HELLO]})
    with pytest.raises(DataError, match="brings its own system message and a system prompt is set"):
        text({"system_prompt_file": str(tmp_path / "brief.txt")}, {})
    lines(tmp_path / "a.jsonl", {"messages": [{"role": "system", "content": "x"}, HELLO]})
    with pytest.raises(DataError, match="has no user message for the prompt to be put around"):
        text({"prompt": "Say {}"}, {})


def test_both_answers_of_a_pair_follow_the_words_around_their_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    encode = ChatEncoder(tokenizer, prompt_format=PromptFormat("Say {}", "Be brief."))
    made = encode.preference(ChatPair((HI,), (HELLO,), ({**HELLO, "content": "No"},)))
    assert made is not None
    for answer, said in ((made.chosen, "Hello"), (made.rejected, "No")):
        text = str(tokenizer.decode(answer.token_ids))
        assert "Be brief.<|im_end|>\n<|im_start|>user\nSay Hi<|im_end|>" in text
        assert tokenizer.decode(answer.token_ids[answer.loss_mask]) == f"{said}<|im_end|>"


def test_a_judged_answer_is_all_that_is_learnt_behind_a_system_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = Chat((HI, HELLO), desirable=True, system_prompt="Be brief.")
    made = ChatEncoder(tokenizer).example(chat)
    assert made is not None
    assert tokenizer.decode(made.token_ids[made.loss_mask]) == "Hello<|im_end|>"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package on the import path with code for records."""
    package = tmp_path / "code" / "mypackage"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "mine.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "mypackage.mine", raising=False)
    monkeypatch.delitem(sys.modules, "mypackage", raising=False)
    return "mypackage.mine"


@pytest.mark.parametrize("form", ["package", "file"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_processor_turns_records_into_items(
    tmp_path: Path, module: str, form: str, streaming: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    where = module if form == "package" else str(tmp_path / "code" / "mypackage" / "mine.py")
    path = lines(tmp_path / "a.jsonl", {"text": "math: 2 + 2?", "gold": "4"}, {"text": "count: 9", "gold": "9"})
    described = {"name": "local", "path": path, "streaming": streaming}
    problems = build_dataset(TASKS.validate_python({**described, "processor": f"{where}:task"}), "train")
    first, second = all_of(pickle.loads(pickle.dumps(problems)))
    assert (first.environment, first.extra, first.index) == ("math", {"ground_truth": "4"}, 0)
    assert (second.environment, second.index) == ("count", 1)
    process = TaskProcessor(tokenizer, PromptFormat("Solve {}"))
    assert process(first).messages[-1]["content"] == "Solve 2 + 2?"
    assert process(second).messages[-1]["content"] == "Count in 9."
    chats = build_chats(EXAMPLES.validate_python({**described, "processor": f"{where}:chat"}), "train")
    assert [chat.messages[-1]["content"] for chat in all_of(chats)] == ["4", "9"]
    pairs = build_pairs(EXAMPLES.validate_python({**described, "processor": f"{where}:pair"}), "train")
    assert [pair.rejected[0]["content"] for pair in all_of(pairs)] == ["no", "no"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_processor_that_fails_names_the_line(tmp_path: Path, module: str, streaming: bool) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "math: 2 + 2?", "gold": "4"}, {"gold": "4"})

    def build(name: str) -> None:
        described = {"name": "local", "path": path, "streaming": streaming, "processor": f"{module}:{name}"}
        all_of(build_dataset(TASKS.validate_python(described), "train"))

    with pytest.raises(DataError, match=r"a\.jsonl, line 2 cannot be read by the processor .*raised KeyError: 'text'"):
        build("task")
    with pytest.raises(DataError, match=r"a\.jsonl, line 1 became NoneType in the processor .*must return Task"):
        build("nothing")
    with pytest.raises(ConfigError, match=r"processor 'mypackage\.mine:absent' does not exist"):
        build("absent")


def test_a_processor_leaves_no_use_for_columns() -> None:
    described = {"name": "local", "path": "a.jsonl", "processor": "a:b"}
    with pytest.raises(ValueError, match="leaves no use for prompt_key: drop one"):
        TASKS.validate_python({**described, "prompt_key": "question"})
    with pytest.raises(ValueError, match="leaves no use for format: drop one"):
        EXAMPLES.validate_python({**described, "format": {"type": "messages"}})


def test_a_data_set_of_ones_own_is_found_by_dotted_path(module: str) -> None:
    spec = TASKS.validate_python(
        {"name": "custom", "path": f"{module}:tasks", "kwargs": {"count": 3}, "prompt": "Solve {}"}
    )
    made = all_of(build_dataset(spec, "train"))
    assert [(task.index, task.environment, task.template) for task in made] == [
        (0, "math", "Solve {}"),
        (1, "math", "Solve {}"),
        (2, "math", "Solve {}"),
    ]


def test_a_held_out_set_with_words_of_its_own_is_still_held_out() -> None:
    mix = {"sum_2_1": 1.0}
    train = {"name": "arithmetic", "num_samples": 400, "mix": mix}
    from nemo_rl.config.schema.data import DataConfig

    data = DataConfig.model_validate({"train": train, "test": {**train, "num_samples": 50, "prompt": "Solve {}"}})
    assert data.test is not None
    test = build_dataset(data.test, "test")
    assert not isinstance(test, ArithmeticDataset)
    learnt, _ = load_tasks(data, seed=0, held_out=test)
    questions = [{task.messages[-1]["content"] for task in all_of(one)} for one in (learnt, test)]
    assert not questions[0] & questions[1]


def test_a_task_with_images_is_not_fed_to_a_model_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="task 3 shows 1 images, and the model is trained on text alone"):
        TaskProcessor(tokenizer)(Task((HI,), "math", index=3, images=(b"PNG",)))
    with pytest.raises(DataError, match="record 3 shows 1 images, and the model is trained on text alone"):
        ChatEncoder(tokenizer).example(Chat((HI, HELLO), index=3, images=(b"PNG",)))
