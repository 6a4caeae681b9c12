"""Arithmetic problems made up offline: the data set that ships with the library.

Problem i of a split is a function of (seed, split name, i) and of the settings alone, so nothing is stored. Splits draw
from different random streams even with equal seeds. There are only a hundred sums of two one-digit numbers, so those
appear in every split; the larger problems of a held-out set are kept out of training by `exclude`.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from nemo_rl.data.chat import PromptFormat
from nemo_rl.data.types import Message, Task
from nemo_rl.errors import DataError

HELD_OUT_MIX: Mapping[str, float] = {"sum_1_1": 0.5, "sum_2_1": 0.3, "sum_2_2": 0.2}
"""Of the held-out test: one- and two-digit sums."""

_MAX_DRAWS = 1000

_SMALL_KINDS = frozenset({"sum_1_1", "product"})  # a hundred problems each, too few to keep any out


@dataclass(frozen=True, slots=True)
class Problem:
    """A question in words and its answer, a non-negative integer."""

    question: str
    answer: int


class ArithmeticDataset:
    """Map-style data set of arithmetic tasks.

    Kinds: `sum_1_1`, `sum_2_1`, `sum_1_2`, `sum_2_2` (the digits of the first and the second number, one-digit 0..9,
    two-digit 10..99), `difference` (0..99, never negative), `product` (one-digit), `word` (a story), `chain` (three
    numbers).

    The user's message is the bare question; `extra` holds `ground_truth` and `kind`.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int = 0,
        split: str = "train",
        mix: Mapping[str, float] = HELD_OUT_MIX,
        exclude: frozenset[str] = frozenset(),
        environment: str = "math",
    ) -> None:
        """Fix the kind of every problem; the problems themselves are made when they are asked for.

        Args:
            num_samples: number of problems.
            seed: together with `split`, decides everything.
            split: name of the random stream.
            mix: share of each kind; they need not sum to 1, and are met exactly, rounded by largest remainder.
            exclude: questions that must not appear, e.g. `unrepeatable_questions(held_out)`.
            environment: name of the environment that judges the answers.

        Raises:
            DataError: no sample was asked for, or the mix is empty, negative or names an unknown kind.
        """
        if num_samples < 1:
            raise DataError(f"the arithmetic data set has num_samples={num_samples}; it needs at least 1")
        if unknown := set(mix) - set(KINDS):
            raise DataError(f"the arithmetic mix names {sorted(unknown)}; the kinds are {', '.join(KINDS)}")
        if not mix or min(mix.values()) < 0 or sum(mix.values()) <= 0:
            raise DataError(f"the arithmetic mix {dict(mix)} has no positive share, or a negative one")
        self._stream = f"{seed}/{split}"
        self._exclude = exclude
        self._environment = environment
        self._kinds = [kind for kind, count in _exact_counts(mix, num_samples).items() for _ in range(count)]
        Random(f"{self._stream}/kinds").shuffle(self._kinds)

    def __len__(self) -> int:
        """Number of problems."""
        return len(self._kinds)

    def __getitem__(self, index: int) -> Task:
        """Make up problem `index`.

        Raises:
            IndexError: the index is outside of the data set.
            DataError: every problem drawn is excluded.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"arithmetic problem {index} of {len(self)}")
        kind, random = self._kinds[index], Random(f"{self._stream}/{index}")
        for _ in range(_MAX_DRAWS):
            problem = KINDS[kind](random)
            if problem.question not in self._exclude:
                return Task(
                    messages=(Message(role="user", content=problem.question),),
                    environment=self._environment,
                    extra={"ground_truth": str(problem.answer), "kind": kind},
                    index=index,
                )
        raise DataError(f"every arithmetic problem of kind {kind!r} is excluded; exclude fewer or change the mix")

    @property
    def fingerprint(self) -> str:
        """Hash of the settings and of the first problems, which changes when the generator itself does."""
        sample = [self[index] for index in range(min(len(self), 16))]
        content = repr((self._stream, self._kinds, sorted(self._exclude), self._environment, sample))
        return hashlib.sha256(content.encode()).hexdigest()


def unrepeatable_questions(held_out: ArithmeticDataset) -> frozenset[str]:
    """The questions of a held-out set that training must not contain: all but one-digit sums and products.

    A sum is kept out in both orders.
    """
    questions: set[str] = set()
    for index in range(len(held_out)):
        task = held_out[index]
        if task.extra["kind"] in _SMALL_KINDS:
            continue
        question = task.messages[-1]["content"]
        questions.add(question)
        if task.extra["kind"].startswith("sum_"):
            left, right = question.removeprefix("What is ").removesuffix("?").split(" + ")
            questions.add(_sum(int(right), int(left)).question)
    return frozenset(questions)


def few_shot_prompt(k: int) -> str:
    """A prompt template with k worked examples before the problem, in one message.

    >>> few_shot_prompt(1).splitlines()[-2:]
    ['Question: {}', 'Answer:']
    """
    shots = [f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in _worked_examples(k)]
    return "".join([*shots, "Question: {}\nAnswer:"])


def best_prompts() -> dict[str, PromptFormat]:
    """Prompts to try on a base model before claiming that training taught it anything."""
    turns = [
        Message(role=role, content=content)
        for question, answer in _worked_examples(4)
        for role, content in (("user", question), ("assistant", str(answer)))
    ]
    return {
        "plain": PromptFormat(),
        "number_only": PromptFormat("{} Answer with the number only."),
        "few_shot_text": PromptFormat(few_shot_prompt(4)),
        "few_shot_chat": PromptFormat(examples=tuple(turns)),
    }


def _worked_examples(k: int) -> list[tuple[str, str]]:
    """Questions and answers from a stream of their own."""
    examples = ArithmeticDataset(k, split="examples")
    tasks = [examples[index] for index in range(k)]
    return [(task.messages[-1]["content"], task.extra["ground_truth"]) for task in tasks]


def _exact_counts(mix: Mapping[str, float], total: int) -> dict[str, int]:
    """Divide `total` by shares: round down, then one more for the largest remainders."""
    shares = {kind: total * share / sum(mix.values()) for kind, share in mix.items()}
    counts = {kind: int(share) for kind, share in shares.items()}
    by_remainder = sorted(shares, key=lambda kind: counts[kind] - shares[kind])
    for kind in by_remainder[: total - sum(counts.values())]:
        counts[kind] += 1
    return counts


def _sum(left: int, right: int) -> Problem:
    return Problem(f"What is {left} + {right}?", left + right)


def _sum_1_1(random: Random) -> Problem:
    return _sum(random.randint(0, 9), random.randint(0, 9))


def _sum_2_1(random: Random) -> Problem:
    return _sum(random.randint(10, 99), random.randint(0, 9))


def _sum_1_2(random: Random) -> Problem:
    return _sum(random.randint(0, 9), random.randint(10, 99))


def _sum_2_2(random: Random) -> Problem:
    return _sum(random.randint(10, 99), random.randint(10, 99))


def _difference(random: Random) -> Problem:
    small, large = sorted((random.randint(0, 99), random.randint(0, 99)))
    return Problem(f"What is {large} - {small}?", large - small)


def _product(random: Random) -> Problem:
    left, right = random.randint(0, 9), random.randint(0, 9)
    return Problem(f"What is {left} * {right}?", left * right)


def _chain(random: Random) -> Problem:
    a, b, c = random.randint(10, 50), random.randint(1, 9), random.randint(2, 9)
    expression, answer = random.choice(
        [
            (f"{a} + {b} + {c}", a + b + c),
            (f"{a} + {b} - {c}", a + b - c),
            (f"{a} - {b} + {c}", a - b + c),
            (f"{b} * {c} + {a}", b * c + a),
        ]
    )
    return Problem(f"What is {expression}?", answer)


def _word(random: Random) -> Problem:
    story, answer = random.choice(_STORIES)
    a, b, c = random.randint(20, 60), random.randint(2, 9), random.randint(2, 9)
    name, friend = random.sample(_NAMES, 2)
    text = story.format(name=name, friend=friend, things=random.choice(_THINGS), a=a, b=b, c=c, bc=b * c)
    return Problem(text, answer(a, b, c))


KINDS: Mapping[str, Callable[[Random], Problem]] = {
    "sum_1_1": _sum_1_1,
    "sum_2_1": _sum_2_1,
    "sum_1_2": _sum_1_2,
    "sum_2_2": _sum_2_2,
    "difference": _difference,
    "product": _product,
    "word": _word,
    "chain": _chain,
}
"""How a problem of each kind is made."""

_NAMES = (
    *("Ada", "Amir", "Bea", "Carlos", "Chen", "Dana", "Elif", "Femi", "Grace", "Hana", "Ivan", "Jonas", "Kofi", "Lena"),
    *("Maya", "Nils", "Olga", "Priya", "Quinn", "Rosa", "Samir", "Tara", "Uma", "Victor", "Wren", "Yusuf", "Zoe"),
)

_THINGS = (
    *("apples", "books", "buttons", "cards", "coins", "crayons", "eggs", "marbles", "oranges", "pencils", "postcards"),
    *("seashells", "stamps", "stickers", "tickets"),
)

# a is 20..60, b and c are 2..9, so that every difference is positive; bc is b * c.
_STORIES: tuple[tuple[str, Callable[[int, int, int], int]], ...] = (
    (
        "{name} has {a} {things}. {friend} gives {name} {b} more. How many {things} does {name} have now?",
        lambda a, b, c: a + b,
    ),
    (
        "{name} has {a} {things} and gives {b} of them to {friend}. How many {things} are left?",
        lambda a, b, c: a - b,
    ),
    (
        "{name} has {a} {things}, and {friend} has {b} fewer. How many {things} does {friend} have?",
        lambda a, b, c: a - b,
    ),
    (
        "{name} collected {a} {things} and {friend} collected {c}. How many {things} did they collect together?",
        lambda a, b, c: a + c,
    ),
    (
        "There are {b} boxes with {c} {things} in each. How many {things} are there in all?",
        lambda a, b, c: b * c,
    ),
    (
        "{name} shares {bc} {things} equally among {c} friends. How many {things} does each friend get?",
        lambda a, b, c: b,
    ),
    (
        "{name} packs {bc} {things} into bags of {b}. How many bags does {name} fill?",
        lambda a, b, c: c,
    ),
    (
        "{name} had {a} {things}, lost {b} of them and then found {c} others. How many {things} does {name} have now?",
        lambda a, b, c: a - b + c,
    ),
    (
        "{name} starts with {a} {things} and gives {b} to {friend} and {c} to a neighbour. "
        "How many {things} does {name} keep?",
        lambda a, b, c: a - b - c,
    ),
    (
        "{name} already has {a} {things} and buys {b} packs of {c}. How many {things} does {name} have in all?",
        lambda a, b, c: a + b * c,
    ),
    (
        "A shop sells {b} {things} in the morning and {c} in the afternoon. It opened with {a}. "
        "How many {things} are left at the end of the day?",
        lambda a, b, c: a - b - c,
    ),
    (
        "{name} reads {b} pages every day. How many pages does {name} read in {c} days?",
        lambda a, b, c: b * c,
    ),
    (
        "A bus leaves with {a} people. At the first stop {b} people get off and {c} get on. "
        "How many people are on the bus now?",
        lambda a, b, c: a - b + c,
    ),
    (
        "{name} is {a} years old and {friend} is {b} years older. How old is {friend}?",
        lambda a, b, c: a + b,
    ),
    (
        "{name} walks {b} kilometres on Monday and {c} kilometres on Tuesday. How many kilometres is that in total?",
        lambda a, b, c: b + c,
    ),
    (
        "A ticket costs {b} dollars. How many dollars do {c} tickets cost?",
        lambda a, b, c: b * c,
    ),
)
