"""The judged answers of an evaluation: as records on disk, as figures, and compared with those of another one."""

import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nemo_rl.data.types import RolloutGroup
from nemo_rl.environments.answers import plain_number
from nemo_rl.errors import ConfigError, DataError
from nemo_rl.objectives.estimates import (
    Difference,
    Estimate,
    average_at_n,
    consensus_at_k,
    paired_difference,
    pass_at_k,
)

type MetricName = Literal["pass@k", "avg@n", "cons@k"]

_SETTING = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[,!;: ]|[\s$]")
"""What only says how an expression is set: spaces, growing brackets, dollar signs."""

_EQUATED = re.compile(r"^[A-Za-z]=")
"""The unknown before a solution."""

SAMPLES, SUMMARY = "samples.jsonl", "summary.json"


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer.

    Attributes:
        index: position of the problem in the data set.
        sample: number of the answer to that problem, from 0.
        problem: the last message of the prompt.
        reply: the answer as text.
        extracted: the answer that the environment read in it; None if there was none to read.
        ground_truth: the known answer.
        score: 1 for a right answer, 0 for a wrong one; the reward where the environment does not tell.
        stop_reason: why it ended, `stop` or `length`.
        num_tokens: its length.
        rewards: the environment's named rewards.
    """

    index: int
    sample: int
    problem: str
    reply: str
    extracted: str | None
    ground_truth: str
    score: float
    stop_reason: str
    num_tokens: int
    rewards: dict[str, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two evaluations on the problems they have in common.

    Attributes:
        metric: what was measured, e.g. `pass@1`.
        first: its mean in the first evaluation.
        second: its mean in the second one.
        difference: second minus first.
        num_prompts: problems in common.
        num_alone: problems that only one of the two has.
    """

    metric: str
    first: float
    second: float
    difference: Difference
    num_prompts: int
    num_alone: int


def samples_of(group: RolloutGroup) -> list[Sample]:
    """The records of all answers to one problem."""
    task = group.task
    return [
        Sample(
            index=task.index,
            sample=number,
            problem=task.messages[-1]["content"],
            reply=rollout.messages[len(task.messages)]["content"],
            extracted=rollout.details.get("extracted") or None,
            ground_truth=str(task.extra.get("ground_truth", "")),
            score=rollout.metrics.get("accuracy", rollout.reward),
            stop_reason=rollout.stop_reason,
            num_tokens=int(rollout.loss_mask.sum()),
            rewards=rollout.rewards,
        )
        for number, rollout in enumerate(group.rollouts)
    ]


def append_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Add one line of JSON for each answer.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("a", encoding="utf-8", errors="replace") as file:
        file.writelines(f"{json.dumps(asdict(sample), ensure_ascii=False)}\n" for sample in samples)


def write_parquet(path: Path, samples: Iterable[Sample]) -> None:
    """Write the same records as a Parquet file.

    Raises:
        OSError: the file cannot be written.
    """
    import pyarrow
    import pyarrow.parquet

    rows = [{**asdict(sample), "rewards": list(sample.rewards.items())} for sample in samples]
    names = {
        **dict.fromkeys(("index", "sample", "num_tokens"), pyarrow.int64()),
        **dict.fromkeys(("problem", "reply", "extracted", "ground_truth", "stop_reason"), pyarrow.string()),
        "score": pyarrow.float64(),
        "rewards": pyarrow.map_(pyarrow.string(), pyarrow.float64()),
    }
    schema = pyarrow.schema([(name, names[name]) for name in Sample.__dataclass_fields__])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)


def read_samples(path: Path) -> list[Sample]:
    """Read what `append_samples` wrote.

    Raises:
        DataError: there is no such file, or a line of it is no answer.
    """
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # a reply holds other line breaks
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); give the eval.save_path of an evaluation") from error
    samples: list[Sample] = []
    for number, line in enumerate(lines, start=1):
        try:
            samples.append(Sample(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}, line {number} is no answer of an evaluation; run the evaluation again") from error
    return samples


def check_scores(metric: MetricName, samples: Iterable[Sample], *, kept: Path | None = None) -> None:
    """Refuse graded scores where right answers are counted.

    Args:
        metric: that is wanted.
        samples: all or some of the answers.
        kept: where the answers are written, for the message.

    Raises:
        ConfigError: `pass@k` or `cons@k` is asked for and a score is neither 0 nor 1.
    """
    graded = None if metric == "avg@n" else next((one.score for one in samples if one.score not in (0, 1)), None)
    if graded is not None:
        where = "" if kept is None else f" (the answers so far are in {kept})"
        raise ConfigError(
            f"{metric} counts right answers, whose score is 1, and wrong ones, whose score is 0, and the environment "
            f"gave {graded:g}; use eval.metric=avg@n{where}"
        )


def scores_by_prompt(metric: MetricName, k: int, samples: Sequence[Sample]) -> dict[tuple[int, str], float]:
    """The figure of every problem, by its index and its text.

    Raises:
        ConfigError: `pass@k` or `cons@k` is asked for and the scores are not those of right and wrong answers.
    """
    check_scores(metric, samples)
    groups = [list(group) for _, group in groupby(samples, key=lambda sample: sample.index)]
    figures = _figures(metric, k, groups).tolist()
    return {(group[0].index, group[0].problem): figure for group, figure in zip(groups, figures, strict=True)}


def metric_title(metric: MetricName, k: int, num_tests: int) -> str:
    """The metric with its number: `pass@1`, `avg@16`."""
    return f"{metric[:-1]}{num_tests if metric == 'avg@n' else k}"


def compare(first: Path, second: Path) -> Comparison:
    """Compare the evaluations in two folders, problem by problem.

    Raises:
        ConfigError: they measured different things.
        DataError: a folder holds no evaluation, or they have fewer than two problems in common.
    """
    settings = [_settings(folder) for folder in (first, second)]
    (metric, k), other_measure = settings
    if (metric, k) != other_measure:
        told = " and ".join("avg@n" if name == "avg@n" else metric_title(name, number, 0) for name, number in settings)
        raise ConfigError(f"{first} and {second} measured {told}; give both the same eval.metric and eval.k_value")
    one, other = (scores_by_prompt(metric, k, read_samples(folder / SAMPLES)) for folder in (first, second))
    common = [key for key in one if key in other]
    if len(common) < 2:
        raise DataError(
            f"{first} and {second} have {len(common)} problems in common and a comparison needs two; evaluate both "
            "models on the same data, with the same prompt and eval.seed"
        )
    values = [torch.tensor([scores[key] for key in common], dtype=torch.float64) for scores in (one, other)]
    return Comparison(
        metric=metric if metric == "avg@n" else metric_title(metric, k, 0),
        first=float(values[0].mean()),
        second=float(values[1].mean()),
        difference=paired_difference(values[0], values[1]),
        num_prompts=len(common),
        num_alone=len(one) + len(other) - 2 * len(common),
    )


def render_comparison(comparison: Comparison, first: str, second: str) -> str:
    """A comparison as text."""
    difference = comparison.difference
    if difference.standard_error == 0:
        found = "on every problem, so there is no spread to take a confidence interval from"
    else:
        settled = difference.low > 0 or difference.high < 0
        verdict = (
            f"{'the second' if difference.value > 0 else 'the first'} is better" if settled else "no clear difference"
        )
        found = (
            f"± {difference.standard_error:.4f}, 95% confidence interval "
            f"[{difference.low:+.4f}, {difference.high:+.4f}]: {verdict}"
        )
    rows = {
        "first": f"{comparison.first:.4f}  {first}",
        "second": f"{comparison.second:.4f}  {second}",
        "difference": f"{difference.value:+.4f} {found}",
        "problems": f"{comparison.num_prompts} in common, compared one by one"
        + (f"; {comparison.num_alone} in only one of the two are left out" if comparison.num_alone else ""),
    }
    return render_block(f"{comparison.metric}, second against first", rows)


def render_estimate(estimate: Estimate) -> str:
    """A mean over problems with its standard error, where there is one."""
    if estimate.num_prompts == 1:
        return f"{estimate.value:.4f} on the one problem, so there is no standard error"
    if estimate.standard_error == 0:
        return f"{estimate.value:.4f} on each of {estimate.num_prompts} problems, so there is no spread"
    error = f"{estimate.value:.4f} ± {estimate.standard_error:.4f}"
    return f"{error} (standard error over {estimate.num_prompts} problems)"


def render_block(title: str, rows: Mapping[str, str]) -> str:
    """A title and aligned rows."""
    return "\n".join([title, *(f"  {name:<12}{text}" for name, text in rows.items())])


def _figures(metric: MetricName, k: int, groups: Sequence[Sequence[Sample]]) -> Tensor:
    """One figure per problem, float64 [P]."""
    if metric == "cons@k":
        votes = [
            consensus_at_k([_said(sample.extracted) for sample in group], [sample.score for sample in group], k=k)
            for group in groups
        ]
        return torch.tensor(votes, dtype=torch.float64)
    totals = torch.tensor([sum(sample.score for sample in group) for group in groups], dtype=torch.float64)
    counts = torch.tensor([len(group) for group in groups])
    return average_at_n(totals, counts) if metric == "avg@n" else pass_at_k(totals.long(), counts, k=k)


def _said(extracted: str | None) -> Hashable | None:
    """What an answer says, equal for the same number and for spellings that differ in how they are set."""
    if extracted is None:
        return None
    spelling = _EQUATED.sub("", _SETTING.sub("", extracted)).removesuffix(".").replace("\\%", "%")
    number = plain_number(spelling)
    return spelling if number is None else number


def _settings(folder: Path) -> tuple[MetricName, int]:
    """What an evaluation measured: metric and k, which is 1 where the metric has none."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        return summary["metric"], 1 if summary["metric"] == "avg@n" else summary["k_value"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} holds no finished evaluation; give the eval.save_path of one") from error
