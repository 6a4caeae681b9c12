import copy
import json
import logging
from functools import cache
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_rl.config.schema.examples import ExampleDataConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.supervised import (
    Supervision,
    prepare_examples,
    prepare_judged,
    prepare_preferences,
    prepare_scored,
)
from nemo_rl.data.types import Chat, Example
from nemo_rl.errors import CheckpointError, DataError
from tiny_models import embedded_folder


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_folder())


def rows(folder: Path, number: int, *, long: int = 0) -> dict[str, str]:
    file = folder / f"rows{number}.jsonl"
    records = [{"prompt": f"{i}?", "completion": "yes " * (99 if i < long else 1)} for i in range(number)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"name": "local", "path": str(file)}


def prepare(data: dict[str, object], **settings: int) -> Supervision[Chat, Example]:
    settings = {"batch_size": 4, "max_length": 64, "seed": 3, **settings}
    return prepare_examples(ExampleDataConfig.model_validate(data), tokenizer(), **settings)


def test_conversations_are_drawn_encoded_and_continue_where_they_were(tmp_path: Path) -> None:
    data = {"train": rows(tmp_path, 10)}
    made = prepare(data)
    batches = [next(made.loader) for _ in range(3)]
    assert sorted(example.index for batch in batches for example in batch)[:10] != [0] * 10
    assert {example.index for batch in batches for example in batch} == set(range(10))
    assert TokenBatch.from_examples(batches[0]).num_sequences == 4
    state = json.loads(json.dumps(made.loader.state_dict()))
    resumed = prepare(data)
    resumed.loader.load_state_dict(state)
    for one, other in zip(next(made.loader), next(resumed.loader), strict=True):
        assert one.index == other.index
        assert torch.equal(one.token_ids, other.token_ids)
    with pytest.raises(CheckpointError, match="training data changed"):
        prepare({"train": rows(tmp_path, 11)}).loader.load_state_dict(state)
    assert made.validation == ()


def test_long_conversations_are_counted_and_validation_says_how_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = {"train": rows(tmp_path, 8, long=3), "validation": rows(tmp_path, 7, long=2), "too_long": "skip"}
    with caplog.at_level(logging.INFO):
        made = prepare(data)
    assert [example.index for example in made.validation] == [2, 3, 4, 5, 6]
    assert "2 of 7 records are too long and are left out" in caplog.text
    drawn = {example.index for _ in range(4) for example in next(made.loader)}
    assert drawn == {3, 4, 5, 6, 7}
    assert made.loader.num_skipped >= 3
    assert [example.index for example in prepare(data, max_val_samples=2).validation] == [2, 3]
    with pytest.raises(DataError, match="all records of the validation set are too long"):
        prepare({**data, "validation": rows(tmp_path, 2, long=2)})
    with pytest.raises(DataError, match=r"record 0 has .* tokens and the limit is 64"):
        prepare({**data, "too_long": "error"})
    assert len(prepare({**data, "too_long": "error", "max_input_seq_length": 400}).validation) == 7


def records_in(folder: Path, kind: str, records: list[dict[str, object]]) -> dict[str, object]:
    """A data set of that kind of file."""
    path = folder / f"records.{kind}"
    data = Dataset.from_list(records)
    match kind:
        case "parquet":
            data.to_parquet(path)
        case "csv":
            data.to_csv(path)
        case _:
            path.write_text(json.dumps(records))
    return {"name": "local", "path": str(path)}


@pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
def test_a_malformed_record_is_found_before_the_first_step_or_left_out(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "yes" if i == 8 else "no"} for i in range(17)]
    train = records_in(tmp_path, kind, records)
    sizes = {"batch_size": 4, "max_length": 64, "seed": 3}
    with pytest.raises(DataError, match=rf"{kind}, record 8 has the same chosen and rejected answer.*remove it"):
        prepare_preferences(ExampleDataConfig.model_validate({"train": train}), tokenizer(), **sizes)
    data = ExampleDataConfig.model_validate({"train": {**train, "malformed": "skip"}})
    with caplog.at_level(logging.INFO):
        made = prepare_preferences(data, tokenizer(), **sizes)
    assert "1 of 17 records are malformed and are left out" in caplog.text and "record 8 has the same" in caplog.text
    assert {pair.index for _ in range(4) for pair in next(made.loader)} == set(range(16))


def test_streams_cannot_be_looked_through(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be looked through before the run: set malformed to error"):
        ExampleDataConfig.model_validate({"train": {**rows(tmp_path, 2), "streaming": True, "malformed": "skip"}})


@pytest.mark.parametrize("streaming", [False, True])
def test_answers_that_are_judged_bad_are_not_imitated(
    streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "judged.jsonl"
    records = [{"prompt": f"{i}?", "completion": "good" if i % 3 else "bad", "label": bool(i % 3)} for i in range(12)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    train = {"name": "local", "path": str(file), "streaming": streaming}
    with caplog.at_level(logging.INFO):
        made = prepare({"train": train})
    drawn = [example for _ in range(4) for example in next(made.loader)]
    assert all(tokenizer().decode(one.token_ids[one.loss_mask]) == "good<|im_end|>" for one in drawn)
    if not streaming:
        assert "4 of 12 records have an answer that is judged bad and are left out" in caplog.text
    sizes = {"batch_size": 12, "max_length": 64, "seed": 3}
    kto = prepare_judged(ExampleDataConfig.model_validate({"train": train, "roles": ["user"]}), tokenizer(), **sizes)
    both = next(kto.loader)
    assert sorted(bool(example.desirable) for example in both) == [False] * 4 + [True] * 8
    assert "?" not in "".join(tokenizer().decode(example.token_ids[example.loss_mask]) for example in both)


def test_kto_needs_labels_and_two_answers_to_validate_on(tmp_path: Path) -> None:
    sizes = {"batch_size": 4, "max_length": 64, "seed": 3}
    with pytest.raises(DataError, match=r"the records of .*rows3.jsonl have no label; give the data a format"):
        prepare_judged(ExampleDataConfig.model_validate({"train": rows(tmp_path, 3)}), tokenizer(), **sizes)
    records = [{"prompt": "?", "completion": "good", "label": True}] * 3
    data = {"train": records_in(tmp_path, "parquet", records), "split_validation_size": 1}
    with pytest.raises(DataError, match="validation set has a single record"):
        prepare_judged(ExampleDataConfig.model_validate(data), tokenizer(), **sizes)


def test_margins_that_are_asked_for_must_be_there(tmp_path: Path) -> None:
    pairs = [{"prompt": "?", "chosen": "yes", "rejected": "no", "margin": 2.0}] * 3
    train = records_in(tmp_path, "parquet", pairs)
    sizes = {"batch_size": 2, "max_length": 64, "seed": 3, "margins_wanted": True}
    with pytest.raises(DataError, match=r"rm.margin_scale asks for margins, and no pair of data.train states one"):
        prepare_scored(ExampleDataConfig.model_validate({"train": train}), tokenizer(), **sizes)
    stated = {"train": {**train, "format": {"type": "pair", "margin_key": "margin"}}}
    made = prepare_scored(ExampleDataConfig.model_validate(stated), tokenizer(), **sizes)
    assert next(made.loader)[0].margin == 2.0


def test_a_template_that_cannot_write_the_records_is_found_at_once(tmp_path: Path) -> None:
    broken = copy.deepcopy(tokenizer())
    broken.chat_template = "{{ raise_exception('no roles here') }}"
    with pytest.raises(DataError, match=r"record 0: .*no roles here"):
        prepare_examples(
            ExampleDataConfig.model_validate({"train": rows(tmp_path, 3)}), broken, batch_size=2, max_length=64, seed=3
        )


def test_roles_decide_what_is_learnt(tmp_path: Path) -> None:
    data = {"train": rows(tmp_path, 4), "roles": ["user"], "shuffle": False}
    example = next(prepare(data).loader)[0]
    assert tokenizer().decode(example.token_ids[example.loss_mask]) == "0?<|im_end|>"


def test_pairs_are_drawn_as_groups_of_two() -> None:
    data = ExampleDataConfig.model_validate(
        {"train": {"name": "arithmetic", "num_samples": 20}, "split_validation_size": 5}
    )
    made = prepare_preferences(data, tokenizer(), batch_size=4, max_length=64, seed=3)
    batch = TokenBatch.from_preferences(next(made.loader))
    assert batch.group_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(made.validation) == 5
    first = made.validation[0]
    answers = [tokenizer().decode(one.token_ids[one.loss_mask]) for one in (first.chosen, first.rejected)]
    assert answers[0] != answers[1]
    assert all(str(answer).endswith("<|im_end|>") for answer in answers)
