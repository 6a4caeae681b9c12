"""Token counts: measured once, kept, made again when they are damaged or when what they depend on changes."""

import json
import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_rl.config.schema.data import DataSpec
from nemo_rl.config.schema.examples import ExampleDataConfig
from nemo_rl.data.chat import PromptFormat
from nemo_rl.data.datasets.registry import build_chats, build_dataset, build_pairs
from nemo_rl.data.datasets.streams import held
from nemo_rl.data.examples import ChatEncoder
from nemo_rl.data.lengths import LengthCache, LengthFilter
from nemo_rl.data.processors import TaskProcessor
from nemo_rl.data.supervised import prepare_examples, prepare_preferences
from nemo_rl.data.types import ItemDataset, Task
from nemo_rl.errors import DataError
from tiny_models import embedded_folder

SPEC: TypeAdapter[DataSpec] = TypeAdapter(DataSpec)
WORDS = (3, 50, 5, 80, 4, 60, 2)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_folder())


def tasks(folder: Path, words: Iterable[int] = WORDS) -> ItemDataset[Task]:
    file = folder / "rows.jsonl"
    rows = [{"prompt": "word " * count, "answer": count} for count in words]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return held(build_dataset(SPEC.validate_python({"name": "local", "path": str(file)}), "train"), "a test reads")


@dataclass
class Counted:
    """How many items were measured, as seen by the bar."""

    totals: list[int] = field(default_factory=list)

    def track(self, items: Iterable[int], name: str, total: int) -> Iterable[int]:
        self.totals.append(total)
        assert name == "counting tokens"
        return items


def measure(
    tokenizer: PreTrainedTokenizerBase, folder: Path, data: ItemDataset[Task], form: PromptFormat | None = None
) -> tuple[list[int], bool]:
    """Lengths, and whether they were counted rather than read."""
    counted = Counted()
    process = TaskProcessor(tokenizer, form or PromptFormat())
    cut = LengthFilter(20, tokenizer, LengthCache(folder / "cache", counted.track))
    lengths = cut.lengths(data, process.length, (process.prompt_format,)).tolist()
    return lengths, bool(counted.totals)


def test_lengths_are_those_of_the_prompts_and_are_counted_once(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = tasks(tmp_path)
    process = TaskProcessor(tokenizer)
    real = [len(process(data[index]).token_ids) for index in range(len(data))]
    assert measure(tokenizer, tmp_path, data) == (real, True)
    assert measure(tokenizer, tmp_path, tasks(tmp_path)) == (real, False)
    assert measure(pickle.loads(pickle.dumps(tokenizer)), tmp_path, data) == (real, False)


def test_lengths_are_counted_anew_when_what_they_depend_on_changes(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = tasks(tmp_path)
    before, _ = measure(tokenizer, tmp_path, data)
    prompted, again = measure(tokenizer, tmp_path, data, PromptFormat(prompt="Solve: {}"))
    assert again and all(one > other for one, other in zip(prompted, before, strict=True))
    assert measure(tokenizer, tmp_path, data, PromptFormat(system_prompt="Be brief."))[1]
    other: Any = AutoTokenizer.from_pretrained(embedded_folder())
    other.chat_template = other.chat_template + " "
    assert measure(other, tmp_path, data)[1]
    larger: Any = AutoTokenizer.from_pretrained(embedded_folder())
    larger.add_tokens(["word word word"])
    assert measure(larger, tmp_path, data)[0] < before
    assert measure(tokenizer, tmp_path, tasks(tmp_path, (1, 2)))[1]
    assert measure(tokenizer, tmp_path, tasks(tmp_path))[1] is False


@pytest.mark.parametrize("harm", ["truncated", "flipped", "emptied", "another"])
def test_a_damaged_file_is_made_again_with_one_warning(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = tasks(tmp_path)
    right, _ = measure(tokenizer, tmp_path, data)
    (file,) = (tmp_path / "cache").iterdir()
    content = bytearray(file.read_bytes())
    if harm == "another":
        measure(tokenizer, tmp_path / "other", tasks(tmp_path, (1, 2)))
        content = bytearray(next((tmp_path / "other" / "cache").iterdir()).read_bytes())
        data = tasks(tmp_path)
    elif harm == "flipped":
        content[100] ^= 0xFF  # behind the header of the file in the archive
    else:
        del content[len(content) // 2 if harm == "truncated" else 0 :]
    file.write_bytes(content)
    with caplog.at_level("WARNING"):
        assert measure(tokenizer, tmp_path, data) == (right, True)
    assert caplog.text.count("are damaged") == len(caplog.records) == 1
    assert measure(tokenizer, tmp_path, data) == (right, False)


def test_a_folder_that_cannot_be_written_stops_nothing(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    lengths, _ = measure(tokenizer, tmp_path, tasks(tmp_path))
    assert len(lengths) == len(WORDS)
    assert "cannot be kept" in caplog.text


def test_the_filter_keeps_what_fits_and_says_how_many_do_not(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, process = tasks(tmp_path), TaskProcessor(tokenizer)
    lengths = [process.length(data[index]) for index in range(len(data))]
    limit = sorted(lengths)[4]
    with caplog.at_level("INFO"):
        kept = LengthFilter(limit, tokenizer, num_workers=1).fitting(data, process.length, ())
    assert [kept[index].extra["ground_truth"] for index in range(len(kept))] == ["3", "50", "5", "4", "2"]
    assert [kept[index].index for index in range(len(kept))] == [0, 1, 2, 3, 4]
    assert kept.fingerprint != data.fingerprint
    assert f"2 of 7 training records are longer than {limit} tokens and are left out" in caplog.text
    everything = LengthFilter(max(lengths), tokenizer).fitting(data, process.length, ())
    assert len(everything) == 7
    with pytest.raises(DataError, match=rf"all 7 training records are longer than 3 tokens .*has {min(lengths)}\)"):
        LengthFilter(3, tokenizer).fitting(data, process.length, ())


def test_conversations_and_pairs_are_filtered_before_the_first_step(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    counted = Counted()
    cache = LengthCache(tmp_path / "cache", counted.track)
    sizes = {"batch_size": 2, "max_length": 60, "seed": 0, "lengths": cache}
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"prompt": "Hi", "completion": "word " * n}) + "\n" for n in WORDS))
    data = ExampleDataConfig.model_validate({"train": {"name": "local", "path": str(chats)}, "too_long": "filter"})
    encode = ChatEncoder(tokenizer)
    whole = build_chats(data.train, "train")
    lengths = [len(encode.example(whole[index]).token_ids) for index in range(len(whole))]
    made = prepare_examples(data, tokenizer, **sizes)
    assert 0 < sum(length <= 60 for length in lengths) < len(lengths)
    for _ in range(10):
        next(made.loader)
    assert made.loader.num_skipped == 0
    assert made.loader.epoch == 20 // sum(length <= 60 for length in lengths)
    pairs = tmp_path / "pairs.jsonl"
    rows = ({"prompt": "Hi", "chosen": "a", "rejected": "word " * n} for n in WORDS)
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = data.model_copy(update={"train": data.train.model_copy(update={"path": str(pairs)})})
    assert len(build_pairs(data.train, "train")) == 7
    for _ in range(2):
        made = prepare_preferences(data, tokenizer, **sizes)
    assert len(next(made.loader)) == 2 and made.loader.num_skipped == 0
    assert counted.totals == [7, 7]  # the pairs were not counted again
    assert len(os.listdir(tmp_path / "cache")) == 2


def test_a_record_that_cannot_be_encoded_stops_before_the_first_step(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = tasks(tmp_path)
    bare: Any = AutoTokenizer.from_pretrained(embedded_folder())
    bare.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(DataError, match="the chat template cannot write a conversation of user"):
        LengthFilter(9, bare).fitting(data, replace(TaskProcessor(tokenizer), tokenizer=bare).length, ())
