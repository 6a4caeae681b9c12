"""The tables of NeMo RL's keys: every key has an answer for every value, and every answer is a clause."""

from collections.abc import Iterator
from typing import Any

import pytest

from nemo_rl.config.nemo.actions import Action, Ignore, Off, Only, Refuse, Set
from nemo_rl.config.nemo.tables import DIALECTS
from nemo_rl.config.nemo.translate import translate
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.sources import Tree, keys_of
from nemo_rl.errors import ConfigError


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("val_reward", "val:accuracy"),
        ("val:reward", "val:accuracy"),
        ("val_loss", "val:loss"),
        ("val:val_loss", "val:loss"),
        ("train_loss", "train:loss"),
        ("validation-default_loss", "val:loss"),
        ("val:validation-my_set_accuracy", "val:accuracy"),
        ("val:accuracy", "val:accuracy"),
        (None, None),
    ],
)
def test_names_of_metrics_of_all_versions_are_understood(old: str | None, new: str | None) -> None:
    values = {"checkpointing": {"metric_name": old, "save_optimizer": True}}
    tree = Tree(values)
    translate(tree, GRPOConfig)
    assert tree.values == {"checkpointing": {"metric_name": new}}


def sentences() -> Iterator[tuple[str, str]]:
    def of(action: Action | None) -> Iterator[str]:
        match action:
            case Ignore(reason=text) | Refuse(instead=text):
                yield text
            case Only(otherwise=inner) | Off(otherwise=inner):
                yield from of(inner)
            case Set(note=str(text)):
                yield text
            case _:
                pass

    for dialect in DIALECTS.values():
        for key, action in dialect.table.items():
            yield from ((key, text) for text in of(action))


def test_every_reason_is_one_clause() -> None:
    for key, text in sentences():
        assert 10 < len(text) < 120 and not text.endswith(".") and text[0].islower() and "\n" not in text, (key, text)


@pytest.mark.parametrize("algorithm", DIALECTS)
@pytest.mark.parametrize("odd", ["odd", 7, -1, None, [], {}, {"enabled": True}, [{"a": 1}], 2.5])
def test_every_key_of_the_tables_is_answered_whatever_its_value(algorithm: str, odd: object) -> None:
    for name in DIALECTS[algorithm].table:
        *parent, last = name.replace("*", "any").split(".")
        values: dict[str, Any] = {"cluster": {"segment_size": None}}
        section = values
        for part in parent:
            section = section.setdefault(part, {})
        section[last] = odd
        try:
            translate(Tree(values, dict.fromkeys(keys_of(values), "f.yaml:1")), GRPOConfig, algorithm)
        except ConfigError as error:
            assert f"unknown key {name} " not in str(error)
