import json
import logging
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_rl.config.schema.examples import ExampleDataConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.supervised import Supervision, prepare_examples, prepare_preferences
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
