import pickle
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest

from nemo_rl.data.datasets.arithmetic import (
    KINDS,
    ArithmeticDataset,
    best_prompts,
    few_shot_prompt,
    unrepeatable_questions,
)
from nemo_rl.data.types import Task
from nemo_rl.errors import DataError


def tasks(dataset: ArithmeticDataset) -> list[Task]:
    return [dataset[index] for index in range(len(dataset))]


def questions(dataset: ArithmeticDataset) -> list[str]:
    return [task.messages[-1]["content"] for task in tasks(dataset)]


def test_problems_depend_on_seed_split_and_index_alone() -> None:
    dataset = ArithmeticDataset(50, seed=3)
    assert tasks(dataset) == tasks(ArithmeticDataset(50, seed=3)) == tasks(pickle.loads(pickle.dumps(dataset)))
    assert dataset[7] == dataset[7]
    assert questions(dataset)[0] == "What is 37 + 65?", "the generator changed: so did every published accuracy"
    others = [ArithmeticDataset(50, seed=3, split="validation"), ArithmeticDataset(50, seed=4)]
    for other in others:
        same = sum(a == b for a, b in zip(questions(dataset), questions(other), strict=True))
        assert same < 10
        assert other.fingerprint != dataset.fingerprint
    assert [task.index for task in tasks(dataset)] == list(range(50))


@pytest.mark.parametrize("kind", ["sum_1_1", "sum_2_1", "sum_1_2", "sum_2_2", "difference", "product", "chain"])
def test_expressions_equal_their_ground_truth(kind: str) -> None:
    for task in tasks(ArithmeticDataset(400, mix={kind: 1.0})):
        expression = re.fullmatch(r"What is ([0-9+*\- ]+)\?", task.messages[-1]["content"])
        assert expression is not None
        assert str(eval(expression[1])) == task.extra["ground_truth"]
        assert int(task.extra["ground_truth"]) >= 0
        assert (task.environment, task.extra["kind"]) == ("math", kind)


@pytest.mark.parametrize(
    ("kind", "digits"), [("sum_1_1", {(1, 1)}), ("sum_2_1", {(2, 1)}), ("sum_1_2", {(1, 2)}), ("sum_2_2", {(2, 2)})]
)
def test_sums_have_the_digits_of_their_name(kind: str, digits: set[tuple[int, int]]) -> None:
    numbers = [re.findall(r"\d+", question) for question in questions(ArithmeticDataset(300, mix={kind: 1}))]
    assert {(len(left), len(right)) for left, right in numbers} == digits


def test_stories_are_varied_and_their_answers_are_what_the_words_say() -> None:
    # Words of a story, and the answer from its numbers in the order in which they are told.
    meaning: dict[str, Callable[..., int]] = {
        "gives [A-Z][a-z]+ .* more": lambda a, b: a + b,
        "gives .* of them": lambda a, b: a - b,
        "fewer": lambda a, b: a - b,
        "collected": lambda a, b: a + b,
        "boxes": lambda a, b: a * b,
        "shares": lambda a, b: a // b,
        "packs .* into bags": lambda a, b: a // b,
        "lost": lambda a, b, c: a - b + c,
        "to a neighbour": lambda a, b, c: a - b - c,
        "buys": lambda a, b, c: a + b * c,
        "shop": lambda a, b, c: c - a - b,
        "pages": lambda a, b: a * b,
        "bus": lambda a, b, c: a - b + c,
        "years old": lambda a, b: a + b,
        "walks": lambda a, b: a + b,
        "ticket costs": lambda a, b: a * b,
    }
    stories = tasks(ArithmeticDataset(600, mix={"word": 1.0}))
    told: Counter[str] = Counter()
    for task in stories:
        text = task.messages[-1]["content"]
        (words,) = [words for words in meaning if re.search(words, text)]
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        assert str(meaning[words](*numbers)) == task.extra["ground_truth"], text
        assert int(task.extra["ground_truth"]) >= 0, text
        assert "{" not in text
        told[words] += 1
    assert told.keys() == meaning.keys()
    assert len({task.messages[-1]["content"] for task in stories}) > 550


def test_a_mix_is_met_exactly_with_the_largest_remainders_rounded_up() -> None:
    def counts(num_samples: int, mix: dict[str, float]) -> Counter[str]:
        return Counter(task.extra["kind"] for task in tasks(ArithmeticDataset(num_samples, mix=mix)))

    assert counts(10, {"sum_1_1": 0.5, "sum_2_1": 0.3, "sum_2_2": 0.2}) == {"sum_1_1": 5, "sum_2_1": 3, "sum_2_2": 2}
    assert counts(7, {"sum_1_1": 1, "product": 1, "chain": 1}) == {"sum_1_1": 3, "product": 2, "chain": 2}
    assert counts(3, {"sum_1_1": 0.1, "product": 0.9}) == {"product": 3}
    kinds = [task.extra["kind"] for task in tasks(ArithmeticDataset(100))]
    assert sum(a != b for a, b in pairwise(kinds)) > 30, "kinds come in blocks"


def test_the_default_mix_is_that_of_the_held_out_test() -> None:
    kinds = Counter(task.extra["kind"] for task in tasks(ArithmeticDataset(200, split="test")))
    assert kinds == {"sum_1_1": 100, "sum_2_1": 60, "sum_2_2": 40}


def test_training_never_contains_a_two_digit_problem_of_the_held_out_test_in_either_order() -> None:
    held_out = ArithmeticDataset(200, split="test")
    excluded = unrepeatable_questions(held_out)
    assert excluded >= {task.messages[-1]["content"] for task in tasks(held_out) if task.extra["kind"] != "sum_1_1"}
    free, clean = (ArithmeticDataset(3000, seed=1, exclude=exclude) for exclude in (frozenset[str](), excluded))
    assert set(questions(free)) & excluded, "without exclusion they do overlap"
    assert not set(questions(clean)) & excluded
    flipped = {re.sub(r"is (\d+) \+ (\d+)", r"is \2 + \1", question) for question in questions(clean)}
    assert not flipped & excluded
    assert free.fingerprint != clean.fingerprint
    # Small spaces cannot be kept apart: a test of all hundred products excludes nothing.
    assert not unrepeatable_questions(ArithmeticDataset(200, mix={"product": 1.0, "sum_1_1": 1.0}))


def test_prompts_for_the_base_model_hold_the_problem_and_right_examples() -> None:
    forms = best_prompts()
    assert {"plain", "few_shot_text", "few_shot_chat"} <= forms.keys()
    for form in forms.values():
        messages = form.apply([{"role": "user", "content": "What is 31 + 7?"}])
        assert "What is 31 + 7?" in messages[-1]["content"]
    shown = re.findall(r"Question: What is (\d+) \+ (\d+)\?\nAnswer: (\d+)", few_shot_prompt(4))
    assert len(shown) == 4
    assert all(int(left) + int(right) == int(answer) for left, right, answer in shown)
    turns = forms["few_shot_chat"].examples
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 4


def test_impossible_settings_are_refused_in_a_sentence() -> None:
    with pytest.raises(DataError, match="num_samples=0"):
        ArithmeticDataset(0)
    with pytest.raises(DataError, match=r"\['sums'\]; the kinds are sum_1_1"):
        ArithmeticDataset(5, mix={"sums": 1.0})
    for mix in ({}, {"sum_1_1": 0.0}, {"sum_1_1": 2.0, "chain": -1.0}):
        with pytest.raises(DataError, match="no positive share"):
            ArithmeticDataset(5, mix=mix)
    with pytest.raises(IndexError):
        ArithmeticDataset(5)[5]
    everything = frozenset(f"What is {left} * {right}?" for left in range(10) for right in range(10))
    with pytest.raises(DataError, match="'product' is excluded"):
        ArithmeticDataset(5, mix={"product": 1.0}, exclude=everything)[0]
    assert set(KINDS) == {"sum_1_1", "sum_2_1", "sum_1_2", "sum_2_2", "difference", "product", "word", "chain"}
