"""Benchmarks by name: where each is on the hub, what its fields hold, and how a problem is put to the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from string import ascii_uppercase
from typing import cast

from nemo_rl.config.schema.evaluation import ARITHMETIC, MMLU_LANGUAGES, EvalDataConfig
from nemo_rl.data.datasets.arithmetic import ArithmeticDataset
from nemo_rl.data.datasets.hub import open_hub
from nemo_rl.data.datasets.local import open_local
from nemo_rl.data.datasets.records import (
    Reader,
    Record,
    RecordDataset,
    RecordFields,
    Table,
    check_answer,
    field_of,
    joined,
    optional_field,
    read_with_datasets,
)
from nemo_rl.data.types import Message, Task, TaskDataset
from nemo_rl.errors import DataError

_NUM_ARITHMETIC = 200
_BOX = "\\boxed{"

_CHOICE_PROMPT = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of LETTERS. Think step by step before answering.\n\n{}"
)
"""The wording of simple-evals, which published figures are made with."""


@dataclass(frozen=True, slots=True)
class BoxedAnswer:
    r"""Reads problems whose known answer is what the last `\boxed{}` of a worked solution holds."""

    problem_key: str
    solution_key: str
    environment: str = "math"

    def read(self, record: Record, index: int, where: str) -> Task:
        """Turn one record into task `index`.

        Raises:
            DataError: a field is missing, or the solution has no box; it begins with `where`.
        """
        task = RecordFields(self.problem_key, self.solution_key, self.environment).read(record, index, where)
        answer = last_boxed(str(task.extra["ground_truth"]))
        if answer is None:
            raise DataError(f"{where} has no \\boxed{{}} in its {self.solution_key!r}, so no known answer; remove it")
        check_answer(answer, self.solution_key, where)
        return replace(task, extra={**task.extra, "ground_truth": answer})


@dataclass(frozen=True, slots=True)
class ChoiceFields:
    """Reads multiple-choice questions.

    Attributes:
        question_key: field of the question.
        options: the field that lists the options, or one field for each of them.
        answer_key: field of the right option, as a letter or counted from 0; None if the first option is the right one,
            and the options are then shuffled.
        subject_key: field of the subject.
        environment: name of the environment that judges the answers.
        seed: decides, with the index, the order of options that are shuffled.
    """

    question_key: str
    options: str | tuple[str, ...]
    answer_key: str | None
    subject_key: str
    environment: str = "multiple_choice"
    seed: int = 0

    def read(self, record: Record, index: int, where: str) -> Task:
        """Turn one record into task `index`.

        Raises:
            DataError: a field is missing, or the right option is none of the options; it begins with `where`.
        """
        question = str(field_of(record, self.question_key, where, setting=None)).strip()
        options = self._options(record, where)
        right = self._right(record, len(options), where)
        if self.answer_key is None:
            order = Random(f"{self.seed}/{index}").sample(range(len(options)), len(options))
            options, right = [options[place] for place in order], order.index(0)
        lettered = dict(zip(ascii_uppercase, options, strict=False))
        listed = "\n".join(f"{letter}) {option}" for letter, option in lettered.items())
        extra = {
            "ground_truth": ascii_uppercase[right],
            "options": lettered,
            "subject": optional_field(record, self.subject_key),
        }
        return Task((Message(role="user", content=f"{question}\n\n{listed}"),), self.environment, extra, index)

    def _options(self, record: Record, where: str) -> list[str]:
        if isinstance(self.options, tuple):
            return [str(field_of(record, key, where, setting=None)).strip() for key in self.options]
        listed = field_of(record, self.options, where, setting=None)
        if not isinstance(listed, list | tuple) or not 2 <= len(listed) <= 10:
            raise DataError(f"{where} has no list of 2 to 10 options in {self.options!r}; correct it")
        return [str(option).strip() for option in cast("Sequence[object]", listed)]

    def _right(self, record: Record, num_options: int, where: str) -> int:
        if self.answer_key is None:
            return 0
        answer = field_of(record, self.answer_key, where, setting=None)
        letter = str(answer).strip()
        place = answer if isinstance(answer, int) else ascii_uppercase.find(letter) if len(letter) == 1 else -1
        if not 0 <= place < num_options:
            raise DataError(f"{where} says that {answer!r} is right, and it has {num_options} options; correct it")
        return place


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark.

    Attributes:
        path: name on the hub.
        reader: how its records become tasks.
        split: its split on the hub.
        subsets: its subsets there, read one after the other; None is the default one.
        letters: of the options; empty if it is not multiple choice.
    """

    path: str
    reader: RecordFields | BoxedAnswer | ChoiceFields
    split: str = "test"
    subsets: tuple[str | None, ...] = (None,)
    letters: str = ""


def _math(path: str, problem_key: str = "problem", answer_after: str = "", **where: object) -> Benchmark:
    reader = RecordFields(problem_key, "answer", "math", answer_after)
    return replace(Benchmark(path, reader), **where)


_GPQA = ChoiceFields(
    "Question",
    ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
    None,
    "Subdomain",
)
_MATH_SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)

BENCHMARKS: Mapping[str, Benchmark] = {
    "aime2024": _math("HuggingFaceH4/aime_2024", split="train"),
    "aime2025": _math("opencompass/AIME2025", "question", subsets=("AIME2025-I", "AIME2025-II")),
    "math": Benchmark("EleutherAI/hendrycks_math", BoxedAnswer("problem", "solution"), subsets=_MATH_SUBJECTS),
    "math500": _math("HuggingFaceH4/MATH-500"),
    "gsm8k": _math("openai/gsm8k", "question", "####", subsets=("main",)),
    "gpqa": Benchmark("Idavidrein/gpqa", _GPQA, "train", ("gpqa_main",), "ABCD"),
    "gpqa_diamond": Benchmark("Idavidrein/gpqa", _GPQA, "train", ("gpqa_diamond",), "ABCD"),
    "mmlu": Benchmark(
        "cais/mmlu", ChoiceFields("question", "choices", "answer", "subject"), subsets=("all",), letters="ABCD"
    ),
    "mmlu_pro": Benchmark(
        "TIGER-Lab/MMLU-Pro", ChoiceFields("question", "options", "answer", "category"), letters="ABCDEFGHIJ"
    ),
    **{
        f"mmlu_{language}": Benchmark(
            "openai/MMMLU",
            ChoiceFields("Question", ("A", "B", "C", "D"), "Answer", "Subject"),
            subsets=(language.replace("-", "_"),),
            letters="ABCD",
        )
        for language in MMLU_LANGUAGES
    },
}


def build_benchmark(data: EvalDataConfig, *, environment: str, seed: int) -> TaskDataset:
    """Build the problems of an evaluation.

    Args:
        data: the `data` section.
        environment: name of the environment that judges the answers.
        seed: decides the order of options that are shuffled.

    Raises:
        DataError: the data are missing, empty or malformed.
    """
    name = data.benchmark
    if name is None:
        settings = ("data.problem_key", "data.solution_key")
        fields = RecordFields(data.problem_key, data.solution_key, environment, settings=settings)
        return RecordDataset(_own(data), fields)
    if name == ARITHMETIC:
        return ArithmeticDataset(data.num_samples or _NUM_ARITHMETIC, split="test", environment=environment)
    benchmark = BENCHMARKS[name]
    reader = replace(benchmark.reader, environment=environment)
    if isinstance(reader, ChoiceFields):
        reader = replace(reader, seed=seed)
    table = _table(benchmark, data)
    return RecordDataset[Task](table, cast("Reader[Task]", reader))


def benchmark_prompt(data: EvalDataConfig) -> str:
    """The template of the user message where the configuration has none: of the letters to choose from, or none."""
    benchmark = BENCHMARKS.get(data.benchmark or "")
    letters = "" if benchmark is None else benchmark.letters
    return _CHOICE_PROMPT.replace("LETTERS", letters) if letters else "{}"


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{}` holds, braces inside it balanced; None if there is none.

    >>> last_boxed("\\boxed{1}, hence $\\boxed{\\frac{3}{4}}$.")
    '\\frac{3}{4}'
    """
    _, found, rest = text.rpartition(_BOX)
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if found and not depth:
            return rest[:place]
    return None


def _own(data: EvalDataConfig) -> Table:
    name = data.dataset_name
    if data.file_format is not None:
        split = data.split or "train"
        return Table(read_with_datasets(data.file_format, source=name, split=split, data_files=name), name)
    return open_local(name) if data.is_file else open_hub(name, split=data.split or "test")


def _table(benchmark: Benchmark, data: EvalDataConfig) -> Table:
    split = data.split or benchmark.split
    if data.path is not None:
        return open_local(data.path) if Path(data.path).is_file() else open_hub(data.path, split=split)
    tables = [open_hub(benchmark.path, split=split, subset=subset) for subset in benchmark.subsets]
    return joined(tables, f"{benchmark.path} (split {split!r})")
